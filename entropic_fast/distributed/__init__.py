"""Several processes: the process group, what ranks say to each other, and heartbeats.

Start with `_process_group`; `_communicator` holds the collectives.
"""

from ._process_group import (
    CollectiveMismatchError,
    RankFailedError,
    RankLostError,
    distribute,
    init,
)

__all__ = ["CollectiveMismatchError", "RankLostError", "RankFailedError", "init", "distribute"]
