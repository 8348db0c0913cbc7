"""Paths between minima: polylines, straight lines, minimum energy paths.

Start with `_path` (the polyline) and `_auto_neb` (the minimum energy path). Relies on `objective`.
"""

from ._auto_neb import auto_neb
from ._config import AutoNEBConfig, annealed
from ._losses import Barrier, Saddle, barrier, path_losses, saddle
from ._path import Path, linear_path
from ._state import NEBResult, NEBState

__all__ = [
    "Path",
    "linear_path",
    "AutoNEBConfig",
    "annealed",
    "auto_neb",
    "NEBResult",
    "NEBState",
    "path_losses",
    "barrier",
    "Barrier",
    "saddle",
    "Saddle",
]
