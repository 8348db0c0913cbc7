"""Geometry of loss landscapes: curvature, minimum energy paths and entropic forces."""

from ._version import __version__
from .curvature import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    ScorePlan,
    curvature_profile,
    density_log_determinant,
    fisher_eigenvalues,
    fisher_trace,
    gradient_norms,
    hessian_trace,
    log_determinant,
    ntk_gram,
    sampled_labels,
    score_gram,
    score_matrix,
    score_plan,
    score_spectrum,
    score_spectrum_floor,
    spectral_density,
    top_eigenvalues,
)
from .dynamics import RidgePotential, RingPotential, Trajectory, relax, simulate_langevin
from .lmc import LMCResult, linear_mode_connectivity
from .objective import NonFiniteLossError, Objective
from .ops.backend import set_backend
from .paths import AutoNEBConfig, NEBResult, Path, auto_neb, linear_path, path_losses
from .results import Density, Eigenpairs, Estimate, LogDeterminant
from .table import Table

__all__ = [
    "__version__",
    "Objective",
    "NonFiniteLossError",
    "score_matrix",
    "score_gram",
    "score_spectrum",
    "score_spectrum_floor",
    "score_plan",
    "ScorePlan",
    "gradient_norms",
    "fisher_trace",
    "sampled_labels",
    "ntk_gram",
    "FisherOperator",
    "fisher_eigenvalues",
    "HessianOperator",
    "GGNOperator",
    "hessian_trace",
    "top_eigenvalues",
    "spectral_density",
    "log_determinant",
    "density_log_determinant",
    "curvature_profile",
    "Path",
    "linear_path",
    "path_losses",
    "auto_neb",
    "AutoNEBConfig",
    "NEBResult",
    "relax",
    "Trajectory",
    "linear_mode_connectivity",
    "LMCResult",
    "simulate_langevin",
    "RingPotential",
    "RidgePotential",
    "Estimate",
    "Eigenpairs",
    "Density",
    "LogDeterminant",
    "Table",
    "set_backend",
]
