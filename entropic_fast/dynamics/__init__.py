"""Dynamics: projected optimizers along a path, their analysis, and Langevin toys."""

from .relax import relax
from .trajectory import DivergenceError, Record, Trajectory

__all__ = ["relax", "Trajectory", "Record", "DivergenceError"]
