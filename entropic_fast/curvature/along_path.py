"""Curvature along a path: one row of numbers a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from .._utils import checks
from .._utils.convergence import warn_of_overflow, warn_once
from .._utils.results import Density, Eigenpairs
from .._utils.table import Table
from ..distributed import RankFailedError, not_finite
from ..objective import NonFiniteLossError, Objective, require_objective
from ._at_point import (
    DEFAULT_DELTA,
    QUANTITIES,
    Point,
    Row,
    lost_row,
    measure_point,
    require_quantities,
)
from .estimators.trace import DEFAULT_PROBES
from .operators._linear_operator import NonFiniteProductError


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
    *,
    density_probes: int = 8,
    steps: int = 60,
    delta: float = DEFAULT_DELTA,
    across: bool = False,
    on_density: Callable[[int, Density], None] | None = None,
) -> Table:
    """Loss and curvature at points along a path.

    The quantities share their work at each point as `profile_point` says, and each point's search
    for the largest eigenvalue begins at the eigenvectors of the one before.

    Args:
        obj: the objective.
        path: anything with `point(s)`, s the relative arc length.
        points: how many, evenly spaced in arc length with both ends (at least 2); or the
            positions themselves, each in [0, 1].
        quantities: of "loss", "fisher_trace", "hessian_trace", "top_eigenvalue", "norm", and
            "density", which is not among the defaults. The defaults of a coupled objective have
            no "fisher_trace".
        seed: of the trace probes and Lanczos vectors, the same at every point, so that
            differences between points have less noise than each point.
        recalibrate, probes, tol, density_probes, steps, delta: as for `profile_point`.
        on_point: called with (index, row) after each point, for progress or storage.
        across: whether "density" leaves out the path's tangent, as the effective potential
            needs; the path then has a method `tangent(s)`.
        on_density: called with (index, density) after each point, with "density" asked for.

    Returns:
        a table with column "s" and those of `profile_point`, a row a point. Of points where a
        result is not converged (a column says so) one `NotConvergedWarning` tells. Where the loss
        overflows it is `inf`, and what needs it NaN, with one RuntimeWarning.

    Raises:
        ValueError: positions, quantities or tol out of range; a path without points; `across`
            without "density", or for a path without tangents; `on_density` without "density"; as
            the quantities' own functions.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> class Line:
    ...     def point(self, s): return torch.tensor([2.0 + s])
    >>> table = curvature_profile(obj, Line(), points=2, quantities=("loss", "norm"))
    >>> table["s"].tolist(), table["loss"].tolist(), table["norm"].tolist()
    ([0.0, 1.0], [2.5, 0.0], [2.0, 3.0])
    """
    require_objective(obj)
    positions = profile_positions(points)
    checks.positive("tol", tol)
    if not callable(getattr(path, "point", None)):
        raise checks.invalid("path", "a path with point(s)", checks.describe(path), "use ef.Path")
    if obj.coupled and tuple(quantities) == QUANTITIES:
        quantities = [name for name in quantities if name != "fisher_trace"]
    require_quantities(obj, quantities)
    checks.functions(on_point=on_point, on_density=on_density)
    checks.boolean("across", across)
    for name, asked in (("across", across), ("on_density", on_density is not None)):
        if asked and "density" not in quantities:
            raise checks.invalid(
                "quantities", f'"density" among them with {name}', checks.shown(quantities)
            )
    tangent = getattr(path, "tangent", None) if across else None
    if across and tangent is None:
        raise checks.invalid(
            "path", "one with tangent(s), for across=True", type(path).__name__, "use ef.Path"
        )
    row: Row
    rows: list[Row] = []
    pairs: Eigenpairs | None = None
    missed: list[str] = []
    lost: list[str] = []
    for index, s in enumerate(positions):
        theta = path.point(s)
        try:
            here = measure_point(
                obj,
                theta,
                quantities,
                seed=seed,
                recalibrate=recalibrate,
                probes=probes,
                tol=tol,
                start=pairs,
                density_probes=density_probes,
                steps=steps,
                delta=delta,
                along=None if tangent is None else tangent(s),
            )
        except (NonFiniteLossError, NonFiniteProductError, RankFailedError) as error:
            loss_is_finite = isinstance(error, NonFiniteProductError)
            if not loss_is_finite and not not_finite(error):
                raise
            row = lost_row(obj, theta, quantities, recalibrate, loss_is_finite=loss_is_finite)
            here = Point(row, pairs, None)
            lost.append(f"s = {s:.6g}: {error}")
        pairs = here.pairs
        missed += [f"at s = {s:.4g}, {message}" for message in here.missed]
        row = {"s": s, **here.row}
        rows.append(row)
        if on_point is not None:
            on_point(index, row)
        if on_density is not None and here.density is not None:
            on_density(index, here.density)
    warn_once(missed, "curvature_profile:")
    if lost:
        warn_of_overflow(
            "curvature_profile", len(lost), len(positions), lost[0], " or its curvature"
        )
    return Table.from_rows(rows)


def profile_positions(points: int | Sequence[float]) -> list[float]:
    """The positions s that `points` stands for in `curvature_profile`.

    Raises:
        ValueError: fewer than 2 points, no position, or one outside [0, 1].

    >>> profile_positions(3)
    [0.0, 0.5, 1.0]
    """
    if not isinstance(points, Iterable):
        count = checks.integer("points", points, 2)
        return [i / (count - 1) for i in range(count)]
    positions = checks.numbers("points", points)
    if not positions:
        raise checks.invalid("points", "at least one position", "none")
    for s in positions:
        if not (math.isfinite(s) and 0 <= s <= 1):
            raise checks.invalid("points", "positions in [0, 1]", checks.shown(s))
    return positions
