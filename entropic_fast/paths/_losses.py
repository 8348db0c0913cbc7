"""The loss along a path: dense evaluation, barrier, saddle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._torch.graph_checks import require_classifier
from .._utils import checks
from .._utils.convergence import warn_of_overflow
from .._utils.devices import is_gpu
from .._utils.table import Table
from ..distributed import RankFailedError, SingleProcess, not_finite
from ..objective import NonFiniteLossError, Objective, require_objective
from ..objective.losses import hits
from . import _arc_length as arc
from ._path import Path

# On a GPU so many points are launched before their losses are read: at most so many numbers.
_POINTS, _NUMBERS = 16, 1 << 26


@dataclass(frozen=True)
class Barrier:
    """How far the loss rises along a path.

    Attributes:
        over_max: highest loss minus the higher end's.
        over_mean: highest loss minus the mean of the two ends'.
        max_loss: highest loss evaluated.
        position: where, s in [0, 1].
    """

    over_max: float
    over_mean: float
    max_loss: float
    position: float


@dataclass(frozen=True)
class Saddle:
    """The highest point of a path, from a dense evaluation.

    At an end (a path that only rises or falls) nothing is interpolated: position and loss are the
    end's, and the bracket reaches to its neighbor.

    Attributes:
        position: s of the parabola's vertex through the highest point and its neighbors.
        loss: the vertex's loss.
        bracket: positions of the neighbors, between which the maximum lies if the evaluation
            resolves it: the position's uncertainty.
        sampled_loss: the highest loss evaluated.
    """

    position: float
    loss: float
    bracket: tuple[float, float]
    sampled_loss: float


def path_losses(
    obj: Objective,
    path: Path,
    points: int | Sequence[float] | Tensor = 9,
    *,
    recalibration_examples: int | None = None,
    on_point: Callable[[int, int], None] | None = None,
) -> Table:
    """The loss over all of the objective's examples, densely along a path.

    At every point, the ends included, running statistics of normalization layers are re-estimated
    first (`Objective.recalibrated`), so all points are treated alike. Where the loss is NaN or
    infinite for any example it is `inf` in the table and the accuracy NaN, with one RuntimeWarning.

    Args:
        obj: the objective.
        path: a path in its parameters.
        points: the number of points between neighboring pivots (which are evaluated too), or the
            positions themselves [K], each in [0, 1].
        recalibration_examples: examples for the statistics; None for all.
        on_point: called with (points done, total points); on a GPU for several points at once.

    Returns:
        columns s, loss, is_pivot, and accuracy for cross-entropy (scores [N, C] and integer targets
        [N]).

    Raises:
        ValueError: a path of another model, or positions outside [0, 1].

    >>> x = torch.tensor([[1.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 0 * x))
    >>> line = Path(torch.tensor([[-1.0], [1.0]]))
    >>> path_losses(obj, line, points=1)["loss"].tolist()
    [1.0, 0.0, 1.0]
    """
    require_objective(obj)
    require_same_parameters(obj, path)
    checks.functions(on_point=on_point)
    if recalibration_examples is not None:
        checks.integer("recalibration_examples", recalibration_examples, 1)
    obj.count(recalibration_examples)
    pivots_at = path.positions.tolist()
    s = _dense(pivots_at, points) if isinstance(points, int) else _given(points)
    classifier = obj.is_classifier
    # Statistics are of all examples at each point: processes take points then, not examples.
    communicator = obj.communicator if obj.has_running_statistics else SingleProcess()
    local = obj.without_distribution() if obj.has_running_statistics else obj
    first, every = communicator.rank, communicator.size

    def local_values() -> Tensor:
        evaluated = torch.zeros(len(s), 1 + classifier, dtype=torch.float64, device=obj.device)
        at = torch.tensor(s, dtype=torch.float64, device=obj.device)[first::every]
        size = max(1, min(_POINTS, _NUMBERS // path.num_params)) if is_gpu(obj.device) else 1
        reported = 0
        for start in range(0, len(at), size):
            points = arc.points_at(path.pivots, path.positions, at[start : start + size])
            point_values = torch.stack(
                [_values(local, point, classifier, recalibration_examples) for point in points]
            )
            places = range(first + start * every, len(s), every)[: len(points)]
            evaluated[places.start : places.stop : every] = point_values
            while on_point is not None and reported <= places[-1]:
                reported += 1
                on_point(reported, len(s))
        for done in range(reported, len(s) if on_point is not None else 0):
            assert on_point is not None
            on_point(done + 1, len(s))
        return evaluated

    call = ("losses along a path", path.pivots, obj.fingerprint)
    evaluated = communicator.all_reduce(local_values, *call)
    lost = ~evaluated[:, 0].isfinite()
    evaluated[lost, 0], evaluated[lost, 1:] = math.inf, math.nan
    if bool(lost.any()):
        _warn_of(lost.nonzero()[:, 0].tolist(), s, local, path, recalibration_examples)
    columns = dict(zip(("loss", "accuracy"), evaluated.T.tolist(), strict=False))
    return Table({"s": s, "loss": columns.pop("loss"), "is_pivot": [p in pivots_at for p in s],
                  **columns})  # fmt: skip


def _values(
    obj: Objective, theta: Tensor, classifier: bool, recalibration_examples: int | None
) -> Tensor:
    """Mean loss and, of a classifier, accuracy at a point [P], on the device.  # [1 or 2]

    As `recalibrated` with `evaluate` or `loss`, but NaN or infinite where these raise.
    """
    if obj.communicator.size > 1:  # whose processes meet at every point
        here = obj.recalibrated(theta, max_examples=recalibration_examples)
        values: tuple[float, ...]
        try:
            values = here.evaluate(theta) if classifier else (here.loss(theta),)
        except (NonFiniteLossError, RankFailedError) as error:
            if not not_finite(error):
                raise
            values = (math.inf, math.nan)[: 1 + classifier]
        return theta.new_tensor(values, dtype=torch.float64)
    here = obj.recalibrated_at(theta, recalibration_examples)
    with torch.no_grad():
        if not classifier:
            return here.unread_loss(theta)[None]
        sums = torch.zeros(3, dtype=torch.float64, device=theta.device)
        for batch in here.batches():
            outputs = here.outputs(theta, batch.inputs)
            require_classifier(outputs, batch.targets)
            sums[0] += here.output_losses(outputs, batch.targets).double().sum()
            sums[1:] += hits(here.loss_fn, outputs, batch.targets)
        loss = sums[0] / here.num_examples + here.penalty(theta)
        return torch.stack([loss, sums[1] / sums[2]])


def _warn_of(
    lost: list[int], s: list[float], obj: Objective, path: Path, recalibration_examples: int | None
) -> None:
    """Warn once of the positions where the loss is not finite, with the first one's reason."""
    first, why = s[lost[0]], ""
    if obj.communicator.size == 1:
        theta = path.point(first)
        try:
            obj.recalibrated(theta, max_examples=recalibration_examples).loss(theta)
        except NonFiniteLossError as error:
            why = f": {error}"
    warn_of_overflow("path_losses", len(lost), len(s), f"s = {first:.6g}{why}")


def barrier(table: Table) -> Barrier:
    """The rise of `loss` along a table that `path_losses` made; infinite if any loss is.

    >>> barrier(Table({"s": [0.0, 0.5, 1.0], "loss": [0.0, 3.0, 1.0]}))
    Barrier(over_max=2.0, over_mean=2.5, max_loss=3.0, position=0.5)
    """
    s, losses = _profile(table)
    top = int(np.argmax(losses))
    highest, ends = float(losses[top]), (float(losses[0]), float(losses[-1]))
    if math.isinf(highest):
        return Barrier(highest, highest, highest, float(s[top]))
    return Barrier(highest - max(ends), highest - sum(ends) / 2, highest, float(s[top]))


def saddle(table: Table) -> Saddle:
    """The highest point of a table that `path_losses` made, interpolated by a parabola.

    Of infinite losses it is the first point, with the nearest finite ones as bracket.

    >>> s = np.linspace(0, 1, 5)
    >>> found = saddle(Table({"s": s, "loss": 1 - (s - 0.4) ** 2}))
    >>> round(found.position, 9), round(found.loss, 9), found.bracket
    (0.4, 1.0, (0.25, 0.75))
    """
    s, losses = _profile(table)
    top = int(np.argmax(losses))
    left, right = max(0, top - 1), min(len(s) - 1, top + 1)
    while right < len(s) - 1 and math.isinf(losses[right]):
        right += 1
    position, height = float(s[top]), float(losses[top])
    bracket = (float(s[left]), float(s[right]))
    if left < top < right and math.isfinite(height):
        # Newton's form of the parabola through the three points, about the middle one.
        u, v = float(s[left]) - position, float(s[right]) - position
        slope_u, slope_v = (losses[left] - height) / u, (losses[right] - height) / v
        bend = float((slope_v - slope_u) / (v - u))
        slope = float(slope_u - bend * u)
        if bend < 0:
            shift = min(max(-slope / (2 * bend), u), v)
            return Saddle(
                position + shift, height + shift * (slope + bend * shift), bracket, height
            )
    return Saddle(position, height, bracket, height)


def require_same_parameters(obj: Objective, path: Path) -> None:
    """Reject a path that is not in the objective's parameters, or in half precision."""
    checks.single_or_double("obj", obj.dtype, "a path")
    checks.instance("path", path, Path, "build one with Path(pivots) or linear_path(a, b)")
    got = (path.num_params, path.pivots.dtype, path.pivots.device)
    want = (obj.num_params, obj.dtype, obj.device)
    if got != want:
        raise checks.invalid(
            "path",
            "pivots of {} parameters, {} on {}".format(*want),
            "{} parameters, {} on {}".format(*got),
            "use a path of this model, converted with path.to(...)",
        )


def _dense(pivots_at: list[float], points: int) -> list[float]:
    checks.integer("points", points)
    s = [0.0]
    for left, right in itertools.pairwise(pivots_at):
        if right > left:
            s += [left + (right - left) * i / (points + 1) for i in range(1, points + 1)]
            s.append(right)
    return s


def _given(points: Sequence[float] | Tensor) -> list[float]:
    try:
        s = torch.as_tensor(points, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise checks.invalid(
            "points", "an integer, or positions [K]", checks.shown(points)
        ) from None
    if s.ndim != 1 or len(s) == 0:
        raise checks.invalid("points", "an integer, or positions [K]", checks.describe(s))
    outside = s[~((s >= 0) & (s <= 1))]
    if len(outside):
        raise checks.invalid(
            "points", "positions in [0, 1] (relative arc length)", str(float(outside[0]))
        )
    return [float(value) for value in s]


def _profile(table: Table) -> tuple[np.ndarray, np.ndarray]:
    s = np.asarray(table["s"], dtype=np.float64)
    losses = np.asarray(table["loss"], dtype=np.float64)
    if len(s) < 2 or s[0] != 0 or s[-1] != 1 or bool((np.diff(s) <= 0).any()):
        raise checks.invalid(
            "table",
            "rows with s ascending from 0 to 1",
            f"s = {s.tolist()[:9]}",
            "evaluate both ends and give the positions in order",
        )
    wrong = losses[np.isnan(losses) | np.isneginf(losses)]
    if len(wrong):
        raise checks.invalid("table", "losses that are finite, or inf", f"{wrong[0]}")
    return s, losses
