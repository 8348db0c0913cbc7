"""Curvature along a path: one row of numbers per point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from .._utils import checks
from .._utils.convergence import held, warn_of_overflow, warn_once
from .._utils.results import Eigenpairs
from .._utils.table import Table
from ..distributed import RankFailedError, not_finite
from ..objective import NonFiniteLossError, Objective, require_objective
from ._at_point import (
    QUANTITIES,
    CurvatureSettings,
    PointCurvature,
    Row,
    curvature_at,
    lost_row,
    require_quantities,
)
from .operators._linear_operator import NonFiniteProductError


class PathLike(Protocol):
    """What a curvature profile asks of a path."""

    def point(self, s: float) -> Tensor:
        """The parameters [P] at relative arc length s in [0, 1]."""
        ...


def curvature_profile(
    obj: Objective,
    path: PathLike,
    points: int | Sequence[float] = 17,
    quantities: Sequence[str] = QUANTITIES,
    *,
    settings: CurvatureSettings = CurvatureSettings(),
    seed: int = 0,
    orthogonal_to_path: bool = False,
    on_point: Callable[[int, PointCurvature], None] | None = None,
) -> Table:
    """Loss and curvature at points along a path, one row per point.

    The quantities at a point share their work as in `curvature_at`, and each search for the
    largest eigenvalue starts at the eigenvectors of the point before.

    Args:
        obj: the objective.
        path: anything with `point(s)`, s the relative arc length.
        points: how many, evenly spaced in arc length with both ends (at least 2); or the
            positions themselves, each in [0, 1].
        quantities: as for `curvature_at`. The defaults of a coupled objective leave out
            "fisher_trace".
        settings: probes, steps and tolerances.
        seed: of the trace probes and Lanczos vectors, the same at every point, so that
            differences between points have smaller errors than the points.
        orthogonal_to_path: whether "density" leaves out the path's tangent, as the effective
            potential needs; the path then has a method `tangent(s)`.
        on_point: called with (index, point) after each point, for progress or storage; the row
            of the `PointCurvature` starts with "s".

    Returns:
        a table with column "s" and those of `curvature_at`. Results that are not converged cause
        one `NotConvergedWarning` for all points. Where the loss overflows it is `inf`, and what
        needs it NaN, with one RuntimeWarning.

    Raises:
        ValueError: positions or quantities out of range; a path without points;
            `orthogonal_to_path` without "density", or for a path without tangents; as the
            quantities' own functions.

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
    if not callable(getattr(path, "point", None)):
        raise checks.invalid("path", "a path with point(s)", checks.describe(path), "use ef.Path")
    if obj.coupled and tuple(quantities) == QUANTITIES:
        quantities = [name for name in quantities if name != "fisher_trace"]
    require_quantities(obj, quantities)
    checks.functions(on_point=on_point)
    checks.instance("settings", settings, CurvatureSettings)
    tangent = _tangent(path, quantities, orthogonal_to_path)
    rows: list[Row] = []
    pairs: Eigenpairs | None = None
    missed: list[str] = []
    lost: list[str] = []
    for index, s in enumerate(positions):
        theta, left_out = path.point(s), None if tangent is None else tangent(s)
        try:
            with held():  # one warning for all points
                here = curvature_at(
                    obj,
                    theta,
                    quantities,
                    settings=settings,
                    seed=seed,
                    start=pairs,
                    orthogonal_to=left_out,
                )
        except (NonFiniteLossError, NonFiniteProductError, RankFailedError) as error:
            loss_is_finite = isinstance(error, NonFiniteProductError)
            if not loss_is_finite and not not_finite(error):
                raise
            row = lost_row(
                obj, theta, quantities, settings.recalibrate, loss_is_finite=loss_is_finite
            )
            here = PointCurvature(row, pairs, None)
            lost.append(f"s = {s:.6g}: {error}")
        here = here._replace(row={"s": s, **here.row})
        pairs = here.pairs
        missed += [f"at s = {s:.4g}, {message}" for message in here.missed]
        rows.append(here.row)
        if on_point is not None:
            on_point(index, here)
    warn_once(missed, "curvature_profile:")
    if lost:
        warn_of_overflow(
            "curvature_profile", len(lost), len(positions), lost[0], " or its curvature"
        )
    return Table.from_rows(rows)


def _tangent(
    path: PathLike, quantities: Sequence[str], orthogonal_to_path: bool
) -> Callable[[float], Tensor] | None:
    """The path's tangent as a function of s; None if it is not left out."""
    if not checks.boolean("orthogonal_to_path", orthogonal_to_path):
        return None
    if "density" not in quantities:
        raise checks.invalid(
            "quantities", '"density" among them with orthogonal_to_path', checks.shown(quantities)
        )
    tangent: Callable[[float], Tensor] | None = getattr(path, "tangent", None)
    if tangent is None:
        raise checks.invalid(
            "path",
            "one with tangent(s), for orthogonal_to_path=True",
            type(path).__name__,
            "use ef.Path",
        )
    return tangent


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
