"""Loss and curvature at one point, from one Hessian operator and its products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.full_precision import full_precision
from .._utils import checks
from .._utils.convergence import held, warn_once
from .._utils.results import Density, Eigenpairs, Estimate
from ..objective import Objective, require_objective
from .estimators._block_lanczos import TRUSTED
from .estimators._density import density_and_pairs
from .estimators._krylov_basis import ROUNDING
from .estimators._log_determinant import density_log_determinant
from .estimators._settings import DensitySettings
from .estimators._tracking import KEPT, tracked_eigenpairs
from .estimators.trace import DEFAULT_PROBES, operator_trace
from .operators._second_order import HessianOperator
from .per_example._norms import fisher_trace

# "density" is not among the defaults because it takes hundreds of products.
QUANTITIES = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm")
ALL_QUANTITIES = (*QUANTITIES, "density")
_OF_HESSIAN = ("hessian_trace", "top_eigenvalue", "density")
Row = dict[str, float | int]
_ERRORS = ("", "_std_error", "_quadrature")


@dataclass(frozen=True)
class CurvatureSettings:
    """Settings of `curvature_at` and `curvature_profile`.

    Attributes:
        recalibrate: whether to re-estimate running statistics at each point first; a number for
            that many examples from the first on. No effect on a model without them.
        probes: of the Hessian trace.
        tol: relative residual at which the largest eigenvalue is converged.
        density: probes and steps of "density".
        delta: above 0, added to each eigenvalue's positive part in log-determinants; by default
            the paper's weight decay.

    >>> CurvatureSettings(density=DensitySettings(steps=20)).probes
    32
    """

    recalibrate: bool | int = True
    probes: int = DEFAULT_PROBES
    tol: float = 1e-3
    density: DensitySettings = DensitySettings()
    delta: float = 5e-4

    def __post_init__(self) -> None:
        checks.integer("probes", self.probes, 1)
        checks.positive("tol", self.tol)
        checks.positive("delta", self.delta)
        checks.instance("density", self.density, DensitySettings)


class PointCurvature(NamedTuple):
    """Loss and curvature at one point.

    Attributes:
        row: the columns of `curvature_at`.
        pairs: the pair of the largest eigenvalue and approximations of those that follow, as the
            next point's `start`; None without "top_eigenvalue" and "density".
        density: None without "density".
        missed: messages about results that are not converged.
    """

    row: Row
    pairs: Eigenpairs | None
    density: Density | None
    missed: tuple[str, ...] = ()


@full_precision()
def curvature_at(
    obj: Objective,
    theta: Tensor | None = None,
    quantities: Sequence[str] = QUANTITIES,
    *,
    settings: CurvatureSettings = CurvatureSettings(),
    seed: int = 0,
    start: Eigenpairs | None = None,
    orthogonal_to: Tensor | None = None,
) -> PointCurvature:
    """Loss and curvature at one point, with one Hessian operator for all quantities.

    The trace deflates the at most 8 directions that the eigenvalue search or the density ends with,
    for one quadratic form each. In trained networks a few eigenvalues dominate the variance of a
    Hutchinson sample: deflating them cut its standard error to about a third (0.17 to 0.51, digits
    CNN) for 5 extra forms, and with the directions of the density to a tenth. The probes are
    independent of the searches, so the estimate is unbiased. The products of the density also give
    the largest eigenvalue; a search follows only if its residual misses the tolerance, or with
    `orthogonal_to`.

    Args:
        obj: the objective.
        theta: the point [P]; None for the model's own.
        quantities: which columns, in this order:
            "loss": "loss", and "accuracy" in [0, 1] for a classifier;
            "fisher_trace", "hessian_trace": the value and its "..._std_error" (over examples, over
            probes);
            "top_eigenvalue": of the Hessian, its "..._residual" and "..._converged" (0 or 1);
            "norm": of theta;
            "density" (hundreds of products): "log_determinant", tr log(H_+ + delta) over the
            positive parts of the eigenvalues, and "negative_mass", the sum of the absolute values
            of the negative ones, each with "..._std_error" (over probes) and "..._quadrature" (see
            `Density.trace`); and "log_determinant_converged" (0 or 1, see `log_determinant`).
        settings: probes, steps and tolerances.
        seed: of the trace probes and Lanczos vectors.
        start: the `PointCurvature.pairs` of a neighboring point, from which to search for the
            largest eigenvalue (`tracked_eigenpairs`).
        orthogonal_to: directions [P] or [P, r] that "density" alone leaves out, such as a path's
            tangent.

    Returns:
        `row` has the columns; for quantities of the Hessian also "products" and "forms", the
        numbers of operator-vector products and quadratic forms; and "norm_examples" last, the
        number of examples on which running statistics were re-estimated.

    Raises:
        ValueError: quantities out of range; as the quantities' own functions.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> row = curvature_at(obj, torch.tensor([2.0]), ("loss", "hessian_trace")).row
    >>> row["loss"], row["hessian_trace"], row["products"], row["forms"]
    (2.5, 5.0, 0, 32)
    """
    require_objective(obj)
    checks.instance("settings", settings, CurvatureSettings)
    require_quantities(obj, quantities)
    norm_examples = _norm_examples(obj, settings.recalibrate)
    if norm_examples:
        obj = obj.recalibrated(theta, max_examples=norm_examples)
    theta = obj.point(theta)
    row: Row = {}
    shared = None
    if any(name in _OF_HESSIAN for name in quantities):
        operator = HessianOperator(obj, theta)
        shared = _Hessian(operator, quantities, settings, seed, start, orthogonal_to)
    with held() as missed:
        for name in quantities:
            if shared is not None and name in _OF_HESSIAN:
                row |= shared.columns(name)
            else:
                row |= _MEASURES[name](obj, theta)
    pairs = density = None
    if shared is not None:
        row |= {"products": shared.operator.products, "forms": shared.forms}
        with held() as more:  # the search may run only now, if no column needed it
            pairs, density = shared.pairs, shared.density
        missed += more
    row["norm_examples"] = norm_examples
    warn_once(missed, "curvature_at:")
    return PointCurvature(row, pairs, density, tuple(missed))


def _norm_examples(obj: Objective, recalibrate: bool | int) -> int:
    """The number of examples on which running statistics are re-estimated; 0 for none."""
    if not obj.has_running_statistics or recalibrate is False:
        return 0
    return obj.num_examples if recalibrate is True else recalibrate


def lost_row(
    obj: Objective,
    theta: Tensor,
    quantities: Sequence[str],
    recalibrate: bool | int,
    *,
    loss_is_finite: bool = False,
) -> Row:
    """The row of a point without a finite loss: `inf`, and NaN for what needs it.

    With `loss_is_finite`, only products of the Hessian are not finite, and what needs them is NaN.
    """
    row: Row = {}
    finite_row: Row = {}
    others = [name for name in quantities if name not in _OF_HESSIAN]
    if loss_is_finite and others:
        settings = CurvatureSettings(recalibrate=recalibrate)
        finite_row = curvature_at(obj, theta, others, settings=settings).row
    for name in quantities:
        if name == "loss":
            row["loss"] = math.inf
            if obj.is_classifier:
                row["accuracy"] = math.nan
        elif name == "norm":
            row |= _norm(obj, theta)
        else:
            row |= dict.fromkeys(_COLUMNS[name], math.nan)
    row |= {name: 0 for name in row if name.endswith("_converged")}
    if any(name in _OF_HESSIAN for name in quantities):
        row |= {"products": 0, "forms": 0}
    return row | {"norm_examples": _norm_examples(obj, recalibrate)} | finite_row


# Columns that are NaN at a point without a finite loss.
_COLUMNS = {
    "fisher_trace": ("fisher_trace", "fisher_trace_std_error"),
    "hessian_trace": ("hessian_trace", "hessian_trace_std_error"),
    "top_eigenvalue": ("top_eigenvalue", "top_eigenvalue_residual", "top_eigenvalue_converged"),
    "density": (
        *(f"{name}{of}" for name in ("log_determinant", "negative_mass") for of in _ERRORS),
        "log_determinant_converged",
    ),
}


def require_quantities(obj: Objective, quantities: Sequence[str]) -> None:
    """Reject quantities that are unknown, or that the objective does not have."""
    if not isinstance(quantities, list | tuple) or not quantities:
        raise checks.invalid(
            "quantities", "a sequence of names", checks.shown(quantities), 'as ("loss",)'
        )
    for name in quantities:
        checks.one_of("quantities", name, ALL_QUANTITIES)
        if name in _OF_HESSIAN:
            checks.single_or_double("obj", obj.dtype, name)
    if "fisher_trace" in quantities and not obj.separable:  # before the others are computed
        raise checks.invalid(
            "quantities",
            "none of single examples where the loss of an example does not depend on that example "
            "alone",
            f'"fisher_trace", with {obj.coupling}',
            'leave it out: quantities=("loss", "hessian_trace", "top_eigenvalue", "norm")',
        )


class _Hessian:
    """The quantities of a point's Hessian, each computed when it is first needed."""

    def __init__(
        self,
        operator: HessianOperator,
        quantities: Sequence[str],
        settings: CurvatureSettings,
        seed: int,
        start: Eigenpairs | None,
        orthogonal_to: Tensor | None,
    ) -> None:
        self.operator, self.forms = operator, 0
        self._with_pairs, self._with_density = (
            name in quantities for name in ("top_eigenvalue", "density")
        )
        self._settings, self._seed, self._start = settings, seed, start
        self._orthogonal_to = orthogonal_to

    def columns(self, name: str) -> Row:
        if name == "hessian_trace":
            return _with_error(name, self._trace())
        if name == "density":
            assert self.density is not None
            sums = {
                "log_determinant": density_log_determinant(self.density, self._settings.delta),
                "negative_mass": self.density.trace(lambda values: (-values).clamp(min=0)),
            }
            row: Row = {}
            for key, estimate in sums.items():
                row |= _with_error(key, estimate) | {f"{key}_quadrature": estimate.quadrature}
            row["log_determinant_converged"] = int(sums["log_determinant"].converged)
            return row
        assert self.pairs is not None
        return {
            "top_eigenvalue": float(self.pairs.values[0]),
            "top_eigenvalue_residual": float(self.pairs.residuals[0]),
            "top_eigenvalue_converged": int(self.pairs.converged),
        }

    @property
    def density(self) -> Density | None:
        return None if self._quadrature is None else self._quadrature[0]

    @cached_property
    def pairs(self) -> Eigenpairs | None:
        """The largest pair and approximations of those that follow, without `orthogonal_to`."""
        if self._quadrature is None:
            return self._tracked(self._start, guarded=True) if self._with_pairs else None
        approximate = self._quadrature[1]
        if not self._with_pairs:
            return approximate
        value, residual = abs(float(approximate.values[0])), float(approximate.residuals[0])
        rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * value
        # Residuals by the recurrence hold where the tolerance is well above rounding.
        tol = self._settings.tol
        exact = tol * value >= TRUSTED * rounding
        if self._orthogonal_to is None and exact and residual <= tol * value:
            return dataclasses.replace(approximate, converged=True)
        return self._tracked(approximate, guarded=False)

    @cached_property
    def _quadrature(self) -> tuple[Density, Eigenpairs] | None:
        if not self._with_density:
            return None
        return density_and_pairs(
            self.operator,
            self._settings.density,
            seed=self._seed,
            orthogonal_to=self._orthogonal_to,
            kept=KEPT,
        )

    def _tracked(self, start: Eigenpairs | None, guarded: bool) -> Eigenpairs:
        return tracked_eigenpairs(
            self.operator, start, tol=self._settings.tol, seed=self._seed, guarded=guarded
        )

    def _trace(self) -> Estimate:
        # The estimate is unbiased for any directions that do not depend on the probes.
        directions = self.pairs if self._quadrature is None else self._quadrature[1]
        estimate = operator_trace(
            self.operator, self._settings.probes, seed=self._seed, deflate=directions
        )
        self.forms += estimate.matvecs
        return estimate


def _with_error(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_std_error": estimate.std_error}


def _loss(obj: Objective, theta: Tensor) -> Row:
    if not obj.is_classifier:
        return {"loss": obj.loss(theta)}
    loss, accuracy = obj.evaluate(theta)
    return {"loss": loss, "accuracy": accuracy}


def _norm(obj: Objective, theta: Tensor) -> Row:
    return {"norm": float(torch.linalg.vector_norm(theta, dtype=torch.float64))}


_MEASURES: dict[str, Callable[[Objective, Tensor], Row]] = {
    "loss": _loss,
    "fisher_trace": lambda obj, theta: _with_error("fisher_trace", fisher_trace(obj, theta)),
    "norm": _norm,
}
