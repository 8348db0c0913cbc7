"""Several processes: the process group, collectives of its ranks, and heartbeats.

Start with `_process_group`; docs/design/distributed.md explains the protocol. Relies on `_torch`
and `_utils`.
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
