"""Curvature at a point of an Objective, and along a path."""

from ._at_point import CurvatureSettings, PointCurvature, curvature_at
from ._crosscheck import FastPathMismatchError, WrongDerivativeError, autograd_only
from .along_path import curvature_profile, profile_positions
from .estimators._density import spectral_density
from .estimators._diagonal import hessian_diagonal, operator_diagonal
from .estimators._eigenvalues import top_eigenvalues
from .estimators._fisher_eigenvalues import fisher_eigenvalues
from .estimators._log_determinant import density_log_determinant, log_determinant
from .estimators._settings import DensitySettings, LanczosSettings
from .estimators._tracking import tracked_eigenpairs
from .estimators.trace import hessian_trace, operator_trace
from .estimators.trace.gauss_newton import ggn_trace
from .operators import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    LinearOperator,
    as_operator,
)
from .per_example._gram_plan import ScorePlan
from .per_example._norms import fisher_trace, gradient_norms
from .per_example._ntk import ntk_gram
from .per_example._sampled_labels import with_sampled_labels
from .per_example._scores import (
    score_gram,
    score_matrix,
    score_plan,
    score_spectrum,
    score_spectrum_floor,
)

__all__ = [
    "score_matrix",
    "score_gram",
    "score_spectrum",
    "score_spectrum_floor",
    "score_plan",
    "ScorePlan",
    "gradient_norms",
    "fisher_trace",
    "with_sampled_labels",
    "ntk_gram",
    "FastPathMismatchError",
    "WrongDerivativeError",
    "autograd_only",
    "LinearOperator",
    "as_operator",
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
    "curvature_at",
    "PointCurvature",
    "CurvatureSettings",
    "LanczosSettings",
    "DensitySettings",
    "tracked_eigenpairs",
    "profile_positions",
]
