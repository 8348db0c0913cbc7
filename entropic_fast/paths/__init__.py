"""Paths between minima: polylines, straight lines, minimum energy paths."""

from .config import AutoNEBConfig, annealed
from .losses import Barrier, Saddle, barrier, path_losses, saddle
from .neb import NEBDivergedError, auto_neb
from .path import Path, linear_path
from .state import NEBResult, NEBState

__all__ = [
    "Path",
    "linear_path",
    "AutoNEBConfig",
    "annealed",
    "auto_neb",
    "NEBResult",
    "NEBState",
    "NEBDivergedError",
    "path_losses",
    "barrier",
    "Barrier",
    "saddle",
    "Saddle",
]
