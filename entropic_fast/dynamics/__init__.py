"""Dynamics: projected optimizers along a path, their analysis, and Langevin toys."""

from .._utils.convergence import DivergenceError
from ._relaxation import (
    Interval,
    RelaxationTime,
    displacement,
    drift,
    mean_interval,
    median_interval,
    relaxation_time,
)
from ._survival import Scaling, Survival, fit_scaling, kaplan_meier, log_rank
from .force._comparison import (
    ForceComparison,
    ForceFit,
    compare_force,
    fit_force,
    shuffled_curvature,
)
from .force._drift import Drift, measure_drift, noiseless_drift
from .force._point_force import PointForce, point_force
from .force._temperature import Temperature, effective_temperature
from .force._weight_norm_growth import RadialShare, radial_share, scale_invariant_rows
from .langevin import (
    ChannelPotential,
    LangevinIntegrator,
    LangevinRecording,
    LangevinResult,
    RidgePotential,
    RingPotential,
    simulate_langevin,
)
from .projected_sgd import (
    OPTIMIZERS,
    Checkpointing,
    CheckpointMismatchError,
    Execution,
    ProjectedSGD,
    Record,
    Recording,
    Trajectory,
    relax,
    relax_many,
)

__all__ = [
    "relax",
    "relax_many",
    "ProjectedSGD",
    "OPTIMIZERS",
    "Recording",
    "Checkpointing",
    "Execution",
    "Trajectory",
    "Record",
    "DivergenceError",
    "CheckpointMismatchError",
    "displacement",
    "drift",
    "relaxation_time",
    "RelaxationTime",
    "Interval",
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
    "LangevinIntegrator",
    "LangevinRecording",
    "LangevinResult",
    "RingPotential",
    "RidgePotential",
    "ChannelPotential",
]
