"""Curvature at a point of an Objective, and along a path."""

from .agreement import DisagreementError, WrongDerivativeError, without_rules
from .density import spectral_density
from .diagonal import hessian_diagonal, operator_diagonal
from .eigenvalues import top_eigenvalues
from .fisher import fisher_trace, gradient_norms
from .fisher_operator import FisherOperator, fisher_eigenvalues
from .ggn import ggn_trace
from .hessian import GGNOperator, HessianOperator
from .jacobian import JacobianOperator
from .labels import sampled_labels
from .logdet import density_log_determinant, log_determinant
from .ntk import ntk_gram
from .plan import ScorePlan
from .point import Point, measure_point, profile_point
from .profile import curvature_profile, profile_positions
from .score import (
    score_gram,
    score_matrix,
    score_plan,
    score_spectrum,
    score_spectrum_floor,
)
from .trace import hessian_trace, operator_trace
from .tracking import tracked_eigenpairs

__all__ = [
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
    "DisagreementError",
    "WrongDerivativeError",
    "without_rules",
    "FisherOperator",
    "fisher_eigenvalues",
    "HessianOperator",
    "GGNOperator",
    "JacobianOperator",
    "hessian_trace",
    "operator_trace",
    "hessian_diagonal",
    "operator_diagonal",
    "ggn_trace",
    "top_eigenvalues",
    "spectral_density",
    "log_determinant",
    "density_log_determinant",
    "curvature_profile",
    "profile_point",
    "measure_point",
    "Point",
    "tracked_eigenpairs",
    "profile_positions",
]
