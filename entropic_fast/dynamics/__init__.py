"""Dynamics: projected optimizers along a path, their analysis, and Langevin toys."""

from .checkpoint import CheckpointMismatchError
from .groups import relax_many
from .langevin import LangevinResult, simulate_langevin
from .potentials import ChannelPotential, RidgePotential, RingPotential
from .relax import relax
from .relaxation import (
    Interval,
    RelaxationTime,
    displacement,
    drift,
    mean_interval,
    median_interval,
    relaxation_time,
)
from .trajectory import DivergenceError, Record, Trajectory

__all__ = [
    "relax",
    "relax_many",
    "Trajectory",
    "Record",
    "DivergenceError",
    "CheckpointMismatchError",
    "displacement",
    "drift",
    "relaxation_time",
    "RelaxationTime",
    "Interval",
    "mean_interval",
    "median_interval",
    "simulate_langevin",
    "LangevinResult",
    "RingPotential",
    "RidgePotential",
    "ChannelPotential",
]
