"""Loss and curvature at one point: quantities that share one operator and its products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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
from .estimators._tracking import KEPT, tracked_eigenpairs
from .estimators.trace import DEFAULT_PROBES, operator_trace
from .operators._second_order import HessianOperator
from .per_example._norms import fisher_trace

# Those not asked for by default cost hundreds of products.
QUANTITIES = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm")
ALL_QUANTITIES = (*QUANTITIES, "density")
_OF_HESSIAN = ("hessian_trace", "top_eigenvalue", "density")
# Added to each eigenvalue's positive part in log-determinants: the paper's weight decay.
DEFAULT_DELTA = 5e-4
Row = dict[str, float | int]
_ERRORS = ("", "_std_error", "_quadrature")


class Point(NamedTuple):
    """What was found at a point.

    Attributes:
        row: the columns of `profile_point`.
        pairs: the largest eigenvalue's pair, and what is known of those that follow, as the next
            point's `start`; None if neither "top_eigenvalue" nor "density" was asked for.
        density: None if it was not asked for.
        missed: what is not converged, as messages.
    """

    row: Row
    pairs: Eigenpairs | None
    density: Density | None
    missed: tuple[str, ...] = ()


def profile_point(
    obj: Objective,
    theta: Tensor | None = None,
    quantities: Sequence[str] = QUANTITIES,
    *,
    seed: int = 0,
    recalibrate: bool | int = True,
    probes: int = DEFAULT_PROBES,
    tol: float = 1e-3,
    start: Eigenpairs | None = None,
    density_probes: int = 8,
    steps: int = 60,
    delta: float = DEFAULT_DELTA,
    along: Tensor | None = None,
) -> Row:
    """One row of `curvature_profile`, as plain numbers.

    All that is of the Hessian is taken from one operator, whose values at the point are kept:

    - The trace leaves out exactly the directions that the eigenvalue's search or the density
      ends with, at the price of a quadratic form each, at most 8. At trained networks few
      eigenvalues make most of a sample's spread: along a path of the digits' small network they
      left a third of the standard error (0.17 to 0.51), by 37 forms instead of 32; those of the
      density a tenth. The trace's signs and the searches' vectors are streams of their own, so
      the estimate is unbiased.
    - The density's products give the largest eigenvalue too. Only where its residual does not
      meet the tolerance, or with `along`, do more products follow, from that vector. The density
      has samples of the trace besides, but the quadratic forms with those directions left out,
      4 % of its price, had less than a tenth of their standard error.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        quantities: which columns, in this order:
            "loss": "loss", and for a classifier "accuracy" (a share of 1);
            "fisher_trace", "hessian_trace": the value and its "..._std_error" (over examples,
            over probes);
            "top_eigenvalue": of the Hessian, its "..._residual" and "..._converged" (0 or 1);
            "norm": of theta;
            "density": "log_determinant", tr log(H_+ + delta) over the positive parts of the
            eigenvalues, and "negative_mass", the sum of the sizes of the negative ones, each
            with its "..._std_error" (over the density's probes) and "..._quadrature", an estimate
            of the error of too few steps (see `Density.trace`), and "log_determinant_converged"
            (0 or 1, see `log_determinant`); hundreds of products.
        seed: of the trace probes and Lanczos vectors.
        recalibrate: whether to re-estimate running statistics at the point first; a number
            for the first so many examples only. Nothing to do for a model without them.
        probes: for the Hessian trace.
        tol: for the largest eigenvalue, relative residual.
        start: pairs of a neighboring point to search the largest eigenvalue from
            (`tracked_eigenpairs`); `measure_point` returns this point's.
        density_probes, steps: `probes` and `steps` of `spectral_density`.
        delta: above 0, in units of the eigenvalues.
        along: directions that "density" leaves out, such as a path's tangent; the other
            quantities do not.  # [P] or [P, r]

    Returns:
        the columns; if any is of the Hessian, "products" and "forms", the operator-vector
        products and quadratic forms spent on them; and "norm_examples" last: how many examples
        the running statistics were re-estimated on, 0 if they were not.

    Raises:
        ValueError: quantities out of range; as the quantities' own functions.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> row = profile_point(obj, torch.tensor([2.0]), ("loss", "hessian_trace"))
    >>> row["loss"], row["hessian_trace"], row["products"], row["forms"]
    (2.5, 5.0, 0, 32)
    """
    found = measure_point(
        obj,
        theta,
        quantities,
        seed=seed,
        recalibrate=recalibrate,
        probes=probes,
        tol=tol,
        start=start,
        density_probes=density_probes,
        steps=steps,
        delta=delta,
        along=along,
    )
    warn_once(list(found.missed), "profile_point:")
    return found.row


@full_precision()
def measure_point(
    obj: Objective,
    theta: Tensor | None = None,
    quantities: Sequence[str] = QUANTITIES,
    *,
    seed: int = 0,
    recalibrate: bool | int = True,
    probes: int = DEFAULT_PROBES,
    tol: float = 1e-3,
    start: Eigenpairs | None = None,
    density_probes: int = 8,
    steps: int = 60,
    delta: float = DEFAULT_DELTA,
    along: Tensor | None = None,
) -> Point:
    """`profile_point`, with the eigenpairs to start from at the next point and the density.

    What is not converged is said by `missed` and by columns, without a warning.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> top = ("top_eigenvalue",)
    >>> pairs = measure_point(obj, torch.tensor([2.0]), top).pairs
    >>> measure_point(obj, torch.tensor([2.1]), top, start=pairs).row["products"]
    1
    """
    require_objective(obj)
    require_quantities(obj, quantities)
    checks.positive("delta", delta)
    norm_examples = _norm_examples(obj, recalibrate)
    if norm_examples:
        obj = obj.recalibrated(theta, max_examples=norm_examples)
    theta = obj.point(theta)
    row: Row = {}
    shared = None
    if any(name in _OF_HESSIAN for name in quantities):
        shared = _Hessian(
            HessianOperator(obj, theta),
            with_pairs="top_eigenvalue" in quantities,
            with_density="density" in quantities,
            seed=seed,
            probes=probes,
            tol=tol,
            start=start,
            density_probes=density_probes,
            steps=steps,
            delta=delta,
            along=along,
        )
    with held() as missed:
        for name in quantities:
            if shared is not None and name in _OF_HESSIAN:
                row |= shared.columns(name)
            else:
                row |= _MEASURES[name](obj, theta)
    if shared is not None:
        row |= {"products": shared.operator.products, "forms": shared.forms}
    row["norm_examples"] = norm_examples
    if shared is None:
        return Point(row, None, None)
    with held() as more:  # a search that no column asked for
        pairs = shared.pairs
    return Point(row, pairs, shared.density, (*missed, *more))


def _norm_examples(obj: Objective, recalibrate: bool | int) -> int:
    """On how many examples running statistics are re-estimated; 0 for none."""
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
    """The row of a point at which the loss is not finite: `inf`, and NaN for what needs it.

    Args:
        loss_is_finite: products of the Hessian alone are not: NaN for what needs them.
    """
    row: Row = {}
    known: Row = {}
    others = [name for name in quantities if name not in _OF_HESSIAN]
    if loss_is_finite and others:
        known = measure_point(obj, theta, others, recalibrate=recalibrate).row
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
    return row | {"norm_examples": _norm_examples(obj, recalibrate)} | known


# Columns of the quantities that a point without a finite loss does not have.
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
    """Refuse quantities that are unknown, or that the objective cannot have.

    Raises:
        ValueError: as said.
    """
    if not isinstance(quantities, list | tuple) or not quantities:
        raise checks.invalid(
            "quantities", "a sequence of names", checks.shown(quantities), 'as ("loss",)'
        )
    for name in quantities:
        checks.one_of("quantities", name, ALL_QUANTITIES)
        if name in _OF_HESSIAN:
            checks.single_or_double("obj", obj.dtype, name)
    if "fisher_trace" in quantities and not obj.separable:  # before work is spent on the others
        raise checks.invalid(
            "quantities",
            "none of single examples where the loss of an example does not depend on that example "
            "alone",
            f'"fisher_trace", with {obj.coupling}',
            'leave it out: quantities=("loss", "hessian_trace", "top_eigenvalue", "norm")',
        )


class _Hessian:
    """The quantities of a point's Hessian, each computed once, when it is first needed.

    Attributes:
        operator: counts the products.
        forms: quadratic forms spent.
    """

    def __init__(
        self,
        operator: HessianOperator,
        *,
        with_pairs: bool,
        with_density: bool,
        seed: int,
        probes: int,
        tol: float,
        start: Eigenpairs | None,
        density_probes: int,
        steps: int,
        delta: float,
        along: Tensor | None,
    ) -> None:
        self.operator, self.forms = operator, 0
        self._with_pairs, self._with_density = with_pairs, with_density
        self._seed, self._probes, self._tol, self._start = seed, probes, tol, start
        self._density_probes, self._steps, self._delta = density_probes, steps, delta
        self._along = along

    def columns(self, name: str) -> Row:
        """The columns of a quantity."""
        if name == "hessian_trace":
            return _with_error(name, self._trace())
        if name == "density":
            assert self.density is not None
            sums = {
                "log_determinant": density_log_determinant(self.density, self._delta),
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
        """The largest pair and some that follow; not of the operator across `along`."""
        if self._quadrature is None:
            return self._tracked(self._start, guarded=True) if self._with_pairs else None
        known = self._quadrature[1]
        if not self._with_pairs:
            return known
        value, residual = abs(float(known.values[0])), float(known.residuals[0])
        rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * value
        # Residuals by the recurrence hold where the tolerance is well above rounding.
        exact = self._tol * value >= TRUSTED * rounding
        if self._along is None and exact and residual <= self._tol * value:
            return dataclasses.replace(known, converged=True)
        return self._tracked(known, guarded=False)

    @cached_property
    def _quadrature(self) -> tuple[Density, Eigenpairs] | None:
        if not self._with_density:
            return None
        return density_and_pairs(
            self.operator,
            self._density_probes,
            self._steps,
            seed=self._seed,
            along=self._along,
            kept=KEPT,
        )

    def _tracked(self, start: Eigenpairs | None, guarded: bool) -> Eigenpairs:
        return tracked_eigenpairs(
            self.operator, start, tol=self._tol, seed=self._seed, guarded=guarded
        )

    def _trace(self) -> Estimate:
        # Any directions serve that do not depend on the signs; the density knows its best.
        known = self.pairs if self._quadrature is None else self._quadrature[1]
        estimate = operator_trace(self.operator, self._probes, seed=self._seed, deflate=known)
        self.forms += estimate.matvecs
        return estimate


def _with_error(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_std_error": estimate.std_error}


def _loss(obj: Objective, theta: Tensor) -> Row:
    if not obj.is_classifier:
        return {"loss": obj.loss(theta)}
    loss, accuracy = obj.evaluate(theta)
    return {"loss": loss, "accuracy": accuracy}


def _fisher_trace(obj: Objective, theta: Tensor) -> Row:
    return _with_error("fisher_trace", fisher_trace(obj, theta))


def _norm(obj: Objective, theta: Tensor) -> Row:
    return {"norm": float(torch.linalg.vector_norm(theta, dtype=torch.float64))}


_MEASURES: dict[str, Callable[[Objective, Tensor], Row]] = {
    "loss": _loss,
    "fisher_trace": _fisher_trace,
    "norm": _norm,
}
