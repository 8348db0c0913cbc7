"""Linear mode connectivity: train to epoch k, branch with two data orders, join by a line.

Frankle, Dziugaite, Roy, Carbin, *Linear mode connectivity and the lottery ticket hypothesis*, ICML
2020; here with the curvature along the line besides the loss.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .._utils import notebook as display
from .._utils.checks import (
    functions,
    instance,
    integer,
    invalid,
    numbers,
    positive,
    shown,
    single_or_double,
)
from .._utils.convergence import held, warn_of_overflow, warn_once
from .._utils.table import Table
from ..curvature import HessianOperator, tracked_eigenpairs
from ..curvature.operators import NonFiniteProductError
from ..objective import NonFiniteLossError, Objective, as_real, plain_name
from ..ops.random_bits.streams import fold_in
from ._config import TrainConfig, Trained
from ._train import train
from .data import ImageData
from .models import build

Task = Callable[[str, Callable[[], Table]], Table]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LineSettings:
    """What is measured on a line between two networks.

    Args:
        points: evenly spaced, ends included; at least 3.
        loss_examples: training examples for loss and normalization statistics; None for all.
        curvature_examples: training examples for the Hessian; None for all.
        tol: relative residual at which an eigenvalue is accepted.

    Raises:
        ValueError: a value outside its range.

    >>> LineSettings(points=5).points
    5
    """

    points: int = 11
    loss_examples: int | None = None
    curvature_examples: int | None = None
    tol: float = 1e-2

    def __post_init__(self) -> None:
        integer("points", self.points, 3)
        positive("tol", self.tol)
        for name in ("loss_examples", "curvature_examples"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)

    def check(self, count: int) -> None:
        """Raise ValueError if more than the `count` training examples are asked for."""
        for name in ("loss_examples", "curvature_examples"):
            if (getattr(self, name) or 0) > count:
                got = str(getattr(self, name))
                raise invalid(name, f"at most {count}, the training examples", got)


@dataclass(frozen=True)
class LMCResult:
    """Loss and curvature on the lines between branches.

    Attributes:
        table: one row per point of a line: k (epoch of branching), point (0 to 1 along the line),
            loss and accuracy on the training examples, test_loss and test_accuracy with a test set,
            eigenvalue (largest of the Hessian), residual (its error bound), converged (1 if it met
            the tolerance, else 0), distance (between the ends, of parameters).
        instability: one row per k: loss_instability, eigenvalue_instability (see `instability`),
            barrier (highest loss on the line minus the mean of the ends, nats), and, with a test
            set, error_barrier (the same for the test error, a share).
    """

    table: Table
    instability: Table

    def _repr_html_(self) -> str:
        points = self.table.num_rows // max(1, self.instability.num_rows)
        return display.table(
            self.instability.columns,
            [tuple(row.values()) for row in self.instability.rows()],
            f"Lines between branches, {points} points each",
        )


class Trunk:
    """The common first part of all branches, trained once and only as far as needed.

    Args:
        model: a name for `entropic_fast.training.models.build`, or a function that makes a module.
        data: the training set.
        config: the recipe.
        seed: of the initial weights and the trunk's data order.
        progress: called with (what, epochs done, total epochs).
    """

    def __init__(
        self,
        model: str | Callable[[], nn.Module],
        data: ImageData,
        config: TrainConfig,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._data, self._config = model, data, config
        self._seed, self._progress = seed, progress
        self._state: Trained | None = None

    def at(self, k: int) -> Trained:
        """A copy of the network and the optimizer's state after k epochs."""
        if integer("k", k) > self._config.epochs:
            raise invalid("k", f"at most {self._config.epochs}, the recipe's epochs", str(k))
        state, self._state = self._state, None  # an interruption leaves no half-trained state
        if state is None or state.epoch > k:
            state = train(self._make(), self._data, self._config, seed=self._seed, stop_epoch=0)
        state = train(
            state.model,
            self._data,
            self._config,
            seed=self._seed,
            resume=state.state,
            stop_epoch=k,
            on_epoch=lambda r: _tell(self._progress, "trunk", r.epoch, k),
        )
        self._state = state
        return copy.deepcopy(state)

    def _make(self) -> nn.Module:
        if callable(self._model):
            return self._model().to(self._data.device)
        channels = self._data.images.shape[1]
        return build(self._model, self._data.num_classes, channels).to(self._data.device)


def branch(
    start: Trained,
    data: ImageData,
    config: TrainConfig,
    number: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Finish training from `start` with the data order of branch `number`; `start` is kept.

    Branches differ only in the order of the data and its augmentation.
    """
    start = copy.deepcopy(start)
    return train(
        start.model,
        data,
        config,
        seed=seed,
        order_seed=fold_in(seed, "branch", integer("number", number)),
        resume=start.state,
        on_epoch=lambda r: _tell(progress, f"branch {number}", r.epoch, config.epochs),
    ).model


def measure_line(
    a: nn.Module,
    b: nn.Module,
    data: ImageData,
    settings: LineSettings | None = None,
    *,
    eval_data: ImageData | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Table:
    """Loss, accuracy and largest Hessian eigenvalue on the straight line from `a` to `b`.

    Normalization statistics are re-estimated from the training examples at every point, the ends
    included. Where the loss overflows it is `inf`, and accuracy and eigenvalue are NaN, with one
    RuntimeWarning.

    Args:
        a, b: networks of one architecture.
        data: the training set.
        settings: default, `LineSettings()`.
        eval_data: a test set, for test_loss and test_accuracy.
        seed: of the eigenvalue solver's start.
        progress: called with (what, points done, total points).

    Returns:
        the columns of `LMCResult.table`, without k.

    Raises:
        ValueError: networks of different architectures, or more examples than there are.
    """
    settings = settings or LineSettings()
    points = settings.points
    objective = Objective(a, "cross_entropy", data.tensors(settings.loss_examples))
    single_or_double("a", objective.dtype, "a line between networks")
    shapes_a, shapes_b = (
        {plain_name(m, n): tuple(p.shape) for n, p in m.named_parameters() if p.requires_grad}
        for m in (a, b)
    )
    if shapes_a != shapes_b:
        raise invalid("b", "a network with the parameters of a", "other names or shapes")
    ends = [
        torch.cat([as_real(p.detach()).flatten() for p in m.parameters() if p.requires_grad])
        for m in (a, b)
    ]
    curvature_data = data.tensors(settings.curvature_examples)
    test_data = None if eval_data is None else eval_data.tensors()
    distance = float((ends[1] - ends[0]).norm())
    rows, pairs = [], None
    messages: list[str] = []
    for i in range(points):
        t = i / (points - 1)
        theta = torch.lerp(ends[0], ends[1], t)  # exact at both ends
        here = objective.recalibrated(theta)
        loss, accuracy = _evaluated(here, theta)
        row: dict[str, float] = {"point": t, "loss": loss, "accuracy": accuracy}
        if test_data is not None:
            row["test_loss"], row["test_accuracy"] = _evaluated(here.with_data(test_data), theta)
        row |= {"eigenvalue": math.nan, "residual": math.nan, "converged": 0}
        with held() as missed, contextlib.suppress(NonFiniteLossError, NonFiniteProductError):
            operator = HessianOperator(here.with_data(curvature_data), theta)
            pairs = tracked_eigenpairs(operator, pairs, tol=settings.tol, seed=seed)
            row["eigenvalue"] = float(pairs.values[0])
            row["residual"] = float(pairs.residuals[0])
            row["converged"] = int(pairs.converged)
        messages += [f"at {t:.4g} of the line, {message}" for message in missed]
        row["distance"] = distance
        rows.append(row)
        _tell(progress, "line", i + 1, points)
    warn_once(messages, "measure_line:")
    lost = [row["point"] for row in rows if math.isnan(row["eigenvalue"])]
    if lost:
        first = f"at {lost[0]:.4g} of the line"
        warn_of_overflow("measure_line", len(lost), points, first, " or its curvature")
    return Table.from_rows(rows)


def _evaluated(obj: Objective, theta: Tensor) -> tuple[float, float]:
    """Loss and accuracy; `inf` and NaN where the loss is not finite."""
    try:
        return obj.evaluate(theta)
    except NonFiniteLossError:
        return math.inf, math.nan


def instability(values: Sequence[float] | np.ndarray) -> float:
    """Relative rise along a path: (max over the path - mean of the ends) / mean of the ends.

    NaN where the mean of the ends is not above 0; infinite where any value is.

    Args:
        values: along the path, ends included.

    Raises:
        ValueError: fewer than 2 values, or one that is NaN or minus infinity.

    >>> instability([1.0, 6.0, 3.0])
    2.0
    """
    path = np.asarray(values, dtype=np.float64)
    if path.ndim != 1 or len(path) < 2 or not (path > -np.inf).all():
        raise invalid("values", "at least 2 finite numbers along a path", shown(values))
    if np.isposinf(path).any():
        return math.inf
    ends = (path[0] + path[-1]) / 2
    return float((path.max() - ends) / ends) if ends > 0 else math.nan


def summarize(table: Table) -> Table:
    """`LMCResult.instability` from `LMCResult.table`."""
    rows = []
    for k in sorted(set(table["k"].tolist())):
        line = table.where(k=k)
        loss = line["loss"]
        row = {
            "k": k,
            "loss_instability": instability(loss),
            "eigenvalue_instability": math.nan
            if np.isnan(line["eigenvalue"]).any()
            else instability(line["eigenvalue"]),
            "barrier": math.inf
            if np.isinf(loss).any()
            else float(loss.max() - (loss[0] + loss[-1]) / 2),
        }
        if "test_accuracy" in table.columns:
            error = 1 - line["test_accuracy"]
            row["error_barrier"] = float(error.max() - (error[0] + error[-1]) / 2)
        rows.append(row)
    return Table.from_rows(rows)


def linear_mode_connectivity(
    model: str | Callable[[], nn.Module],
    data: ImageData,
    config: TrainConfig,
    epochs: Sequence[int] = (0, 1, 2, 4),
    settings: LineSettings | None = None,
    *,
    eval_data: ImageData | None = None,
    seed: int = 0,
    task: Task | None = None,
    progress: Progress | None = None,
) -> LMCResult:
    """Branch training at several epochs and measure the straight lines between the branches.

    For each k: train k epochs, finish training twice with two data orders, and evaluate loss and
    largest Hessian eigenvalue on the line between the two results.

    Args:
        model: a name for `entropic_fast.training.models.build`, or a function that makes a module.
        data: the training set.
        config: the recipe.
        epochs: the values of k, in [0, config.epochs].
        settings: of each line; default, `LineSettings()`.
        eval_data: a test set.
        seed: of everything random.
        task: called as task(name, compute) for every k, to store and resume: it returns the table
            stored under that name, or compute(). The trunk is trained again as far as the first
            missing k needs.
        progress: called with (what, done, total) after every epoch and point.

    Raises:
        ValueError: no epochs, one outside the recipe or twice, and as `train` and `measure_line`.

    >>> from entropic_fast.training.data import load
    >>> data, test = load("digits", limit=40)
    >>> result = linear_mode_connectivity(
    ...     "digits-cnn", data, TrainConfig(epochs=2, augment=False), (0, 2),
    ...     LineSettings(points=3))
    >>> float(result.instability["loss_instability"][1])  # branched at the end: no difference
    0.0
    """
    instance("data", data, ImageData)
    instance("config", config, TrainConfig)
    if eval_data is not None:
        instance("eval_data", eval_data, ImageData)
    if not isinstance(model, str):
        functions(model=model)
    functions(task=task, progress=progress)
    numbers("epochs", epochs)
    chosen = sorted(integer("epochs", k) for k in epochs)
    if not chosen or len(set(chosen)) < len(chosen) or chosen[-1] > config.epochs:
        raise invalid(
            "epochs",
            f"different numbers from 0 to {config.epochs}, at least one",
            shown(tuple(epochs)),
        )
    settings = settings or LineSettings()
    settings.check(len(data))
    trunk = Trunk(model, data, config, seed, progress)

    def compute(k: int) -> Table:
        def tell(what: str, done: int, total: int) -> None:
            _tell(progress, f"k = {k}, {what}", done, total)

        start = trunk.at(k)
        a, b = (branch(start, data, config, i, seed=seed, progress=tell) for i in (1, 2))
        line = measure_line(a, b, data, settings, eval_data=eval_data, seed=seed, progress=tell)
        return Table({"k": [k] * line.num_rows, **line})

    run = task or (lambda name, make: make())
    with held() as missed:
        tables = [run(f"k{k}", lambda k=k: compute(k)) for k in chosen]  # type: ignore[misc]
    warn_once(missed, "linear_mode_connectivity:")
    table = Table({name: np.concatenate([t[name] for t in tables]) for name in tables[0].columns})
    return LMCResult(table, summarize(table))


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
