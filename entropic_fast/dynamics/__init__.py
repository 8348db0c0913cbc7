"""Dynamics: projected optimizers along a path, their analysis, and Langevin toys."""

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
    "Trajectory",
    "Record",
    "DivergenceError",
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
