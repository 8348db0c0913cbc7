"""Curvature along a path: one row of numbers a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..table import Table
from .fisher import fisher_trace
from .hessian import HessianOperator
from .krylov import top_eigenvalues
from .trace import DEFAULT_PROBES, hessian_trace

QUANTITIES = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm")
Row = dict[str, float | int]


class PathLike(Protocol):
    """What a profile asks of a path."""

    def point(self, s: float) -> Tensor:
        """The parameters at relative arc length s in [0, 1].  # [P]"""
        ...


def curvature_profile(
    obj: Objective,
    path: PathLike,
    points: int | Sequence[float] = 17,
    quantities: Sequence[str] = QUANTITIES,
    seed: int = 0,
    recalibrate: bool | int = True,
    on_point: Callable[[int, Row], None] | None = None,
    probes: int = DEFAULT_PROBES,
    tol: float = 1e-3,
) -> Table:
    """Loss and curvature at points along a path.

    Args:
        obj: the objective.
        path: anything with `point(s)`, s the relative arc length.
        points: how many, evenly spaced in arc length with both ends (at least 2); or the
            positions themselves, each in [0, 1].
        quantities: of "loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm".
        seed: of the trace probes and Lanczos vectors, the same at every point, so that
            differences between points have less noise than each point.
        recalibrate, probes, tol: as for `profile_point`.
        on_point: called with (index, row) after each point, for progress or storage.

    Returns:
        a table with column "s" and those of `profile_point`, a row a point.

    Raises:
        ValueError: positions or quantities out of range; as the quantities' own functions.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> class Line:
    ...     def point(self, s): return torch.tensor([2.0 + s])
    >>> table = curvature_profile(obj, Line(), points=2, quantities=("loss", "norm"))
    >>> table["s"].tolist(), table["loss"].tolist(), table["norm"].tolist()
    ([0.0, 1.0], [2.5, 0.0], [2.0, 3.0])
    """
    positions = profile_positions(points)
    _require_quantities(obj, quantities)
    rows: list[Row] = []
    for index, s in enumerate(positions):
        row: Row = {"s": s}
        row |= profile_point(
            obj,
            path.point(s),
            quantities,
            seed=seed,
            recalibrate=recalibrate,
            probes=probes,
            tol=tol,
        )
        rows.append(row)
        if on_point is not None:
            on_point(index, row)
    return Table.from_rows(rows)


def profile_point(
    obj: Objective,
    theta: Tensor | None = None,
    quantities: Sequence[str] = QUANTITIES,
    *,
    seed: int = 0,
    recalibrate: bool | int = True,
    probes: int = DEFAULT_PROBES,
    tol: float = 1e-3,
) -> Row:
    """One row of `curvature_profile`, as plain numbers.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        quantities: which columns, in this order:
            "loss": "loss", and for a classifier "accuracy" (a share of 1);
            "fisher_trace", "hessian_trace": the value and its "..._std_error" (over examples,
            over probes);
            "top_eigenvalue": of the Hessian, its "..._residual" and "..._converged" (0 or 1);
            "norm": of theta.
        seed: of the trace probes and Lanczos vectors.
        recalibrate: whether to re-estimate running statistics at the point first; a number
            for the first so many examples only. Nothing to do for a model without them.
        probes: for the Hessian trace.
        tol: for the largest eigenvalue, relative residual.

    Returns:
        the columns, with "norm_examples" last: how many examples the running statistics were
        re-estimated on, 0 if they were not.

    Raises:
        ValueError: quantities out of range; as the quantities' own functions.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> profile_point(obj, torch.tensor([2.0]), ("loss", "hessian_trace"))
    {'loss': 2.5, 'hessian_trace': 5.0, 'hessian_trace_std_error': 0.0, 'norm_examples': 0}
    """
    _require_quantities(obj, quantities)
    theta = obj.point(theta)
    norm_examples = 0
    if obj.has_running_statistics and recalibrate is not False:
        count = None if recalibrate is True else recalibrate
        obj = obj.recalibrated(theta, max_examples=count)
        norm_examples = count or obj.num_examples
    row: Row = {}
    for name in quantities:
        row |= _MEASURES[name](obj, theta, seed, probes, tol)
    row["norm_examples"] = norm_examples
    return row


def profile_positions(points: int | Sequence[float]) -> list[float]:
    """The positions s that `points` stands for in `curvature_profile`.

    Raises:
        ValueError: fewer than 2 points, no position, or one outside [0, 1].

    >>> profile_positions(3)
    [0.0, 0.5, 1.0]
    """
    if isinstance(points, int):
        checks.whole("points", points, 2)
        return [i / (points - 1) for i in range(points)]
    positions = [float(s) for s in points]
    if not positions:
        raise checks.fail("points", "at least one position", "none")
    for s in positions:
        if not (math.isfinite(s) and 0 <= s <= 1):
            raise checks.fail("points", "positions in [0, 1]", repr(s))
    return positions


def _require_quantities(obj: Objective, quantities: Sequence[str]) -> None:
    if isinstance(quantities, str) or not quantities:
        raise checks.fail("quantities", "a sequence of names", repr(quantities), 'as ("loss",)')
    for name in quantities:
        checks.one_of("quantities", name, QUANTITIES)
        if name in ("hessian_trace", "top_eigenvalue"):
            checks.full_precision("obj", obj.dtype, name)
    if "fisher_trace" in quantities:
        obj.require_single_examples()  # before work is spent on the other quantities


def _loss(obj: Objective, theta: Tensor, seed: int, probes: int, tol: float) -> Row:
    if not _is_classifier(obj, theta):
        return {"loss": obj.loss(theta)}
    loss, accuracy = obj.evaluate(theta)
    return {"loss": loss, "accuracy": accuracy}


def _is_classifier(obj: Objective, theta: Tensor) -> bool:
    if obj.loss_name != "cross_entropy":
        return False
    batch = next(obj.batches())
    with torch.no_grad():
        outputs = obj.outputs(theta, batch.inputs)
    return outputs.ndim == 2 and not batch.targets.is_floating_point()


def _fisher_trace(obj: Objective, theta: Tensor, seed: int, probes: int, tol: float) -> Row:
    estimate = fisher_trace(obj, theta)
    return {"fisher_trace": estimate.value, "fisher_trace_std_error": estimate.std_error}


def _hessian_trace(obj: Objective, theta: Tensor, seed: int, probes: int, tol: float) -> Row:
    estimate = hessian_trace(obj, theta, probes=probes, seed=seed)
    return {"hessian_trace": estimate.value, "hessian_trace_std_error": estimate.std_error}


def _top_eigenvalue(obj: Objective, theta: Tensor, seed: int, probes: int, tol: float) -> Row:
    pairs = top_eigenvalues(HessianOperator(obj, theta), tol=tol, seed=seed)
    return {
        "top_eigenvalue": float(pairs.values[0]),
        "top_eigenvalue_residual": float(pairs.residuals[0]),
        "top_eigenvalue_converged": int(pairs.converged),
    }


def _norm(obj: Objective, theta: Tensor, seed: int, probes: int, tol: float) -> Row:
    return {"norm": float(torch.linalg.vector_norm(theta, dtype=torch.float64))}


_MEASURES: dict[str, Callable[[Objective, Tensor, int, int, float], Row]] = {
    "loss": _loss,
    "fisher_trace": _fisher_trace,
    "hessian_trace": _hessian_trace,
    "top_eigenvalue": _top_eigenvalue,
    "norm": _norm,
}
