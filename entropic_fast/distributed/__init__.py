"""Several processes: the process group, what ranks say to each other, and heartbeats.

Start with `_process_group`; `_communicator` holds the collectives. Relies on `_torch` and `_utils`.
"""

from ._communicator import (
    CollectiveMismatchError,
    Communicator,
    RankFailedError,
    RankLostError,
    SingleProcess,
    not_finite,
)
from ._process_group import distribute, init

__all__ = [
    "CollectiveMismatchError",
    "Communicator",
    "RankFailedError",
    "RankLostError",
    "SingleProcess",
    "distribute",
    "init",
    "not_finite",
]
