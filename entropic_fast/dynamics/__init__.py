"""Dynamics: projected optimizers along a path, their analysis, and Langevin toys."""

from .bursts import Drift, measure_drift, noiseless_drift
from .checkpoint import CheckpointMismatchError
from .comparison import ForceComparison, ForceFit, compare_force, fit_force, shuffled_curvature
from .force import PointForce, point_force
from .groups import relax_many
from .growth import RadialShare, radial_share, scale_invariant_rows
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
from .response import ProjectedSGD
from .survival import Scaling, Survival, fit_scaling, kaplan_meier, log_rank
from .temperature import Temperature, effective_temperature
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
    "ProjectedSGD",
    "measure_drift",
    "noiseless_drift",
    "Drift",
    "point_force",
    "PointForce",
    "compare_force",
    "fit_force",
    "shuffled_curvature",
    "ForceComparison",
    "ForceFit",
    "effective_temperature",
    "Temperature",
    "radial_share",
    "scale_invariant_rows",
    "RadialShare",
    "kaplan_meier",
    "log_rank",
    "fit_scaling",
    "Survival",
    "Scaling",
    "mean_interval",
    "median_interval",
    "simulate_langevin",
    "LangevinResult",
    "RingPotential",
    "RidgePotential",
    "ChannelPotential",
]
