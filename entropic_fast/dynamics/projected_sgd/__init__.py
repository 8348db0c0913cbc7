"""Replicas of SGD (or Adam) projected onto a path: `relax` and `relax_many`.

Start with `_relax`; `_replica_state` is one projection cycle, `_settings` the arguments. Relies on
`paths` and on the kernels of `ops.projected_step`.
"""

from ._checkpoint import CheckpointMismatchError, fingerprint
from ._minibatches import Minibatches, in_random_batches
from ._optimizers import Optimizer
from ._records import Record
from ._relax import relax
from ._relax_many import relax_many
from ._settings import OPTIMIZERS, Checkpointing, Execution, ProjectedSGD, Recording, check_path
from ._trajectory import Trajectory

__all__ = [
    "relax",
    "relax_many",
    "ProjectedSGD",
    "Recording",
    "Checkpointing",
    "Execution",
    "Trajectory",
    "Record",
    "CheckpointMismatchError",
    "fingerprint",
    "check_path",
    "Minibatches",
    "in_random_batches",
    "Optimizer",
    "OPTIMIZERS",
]
