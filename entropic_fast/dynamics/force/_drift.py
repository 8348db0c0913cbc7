"""Drift velocity along a path, measured by short runs of many replicas from chosen positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import norm
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.table import Table
from ...objective import Objective
from ...paths import Path
from .._relaxation import Interval, mean_interval
from ..projected_sgd import (
    Execution,
    Minibatches,
    Optimizer,
    ProjectedSGD,
    Trajectory,
    in_random_batches,
    relax,
)
from ._linear_response import impulse_response


@dataclass(frozen=True, eq=False)
class Drift:
    """Velocities along a path, of independent replicas at each position.

    Attributes:
        position: where the short runs started.  # [K]
        velocity: of each replica, in path lengths per effective time (updates x lr), NaN if it
            diverged.  # [K, R]
        raw: before the noise along the path was subtracted.  # [K, R]
        order_error: standard error of `velocity` common to all replicas of a position, from the
            estimated mean gradient under batch statistics; otherwise 0.  # [K]
        control: whether that noise was subtracted.
        settings: of the short runs.
        trajectory: of all replicas, position by position.
    """

    position: Tensor
    velocity: Tensor
    raw: Tensor
    order_error: Tensor
    control: bool
    settings: ProjectedSGD
    trajectory: Trajectory

    def interval(self, index: int, confidence: float = 0.95) -> Interval:
        """Mean velocity at a position, with Student's t interval that includes `order_error`."""
        velocity = self.velocity[index]
        mean = mean_interval(velocity[~velocity.isnan()], confidence)
        shared = float(self.order_error[index]) * float(norm.ppf((1 + confidence) / 2))
        below, above = (
            math.hypot(mean.value - mean.low, shared),
            math.hypot(mean.high - mean.value, shared),
        )
        return replace(mean, low=mean.value - below, high=mean.value + above)

    def to_table(self, confidence: float = 0.95) -> Table:
        """Columns position, velocity, low, high, replicas; NaN where no replica is left."""
        rows = []
        for i, s in enumerate(self.position.tolist()):
            kept = int((~self.velocity[i].isnan()).sum())
            value = low = high = torch.nan
            if kept:
                interval = self.interval(i, confidence)
                value, low, high = interval.value, interval.low, interval.high
            rows.append(
                {"position": s, "velocity": value, "low": low, "high": high, "replicas": kept}
            )
        return Table.from_rows(rows)


def measure_drift(
    obj: Objective,
    path: Path,
    positions: Sequence[float] | Tensor,
    settings: ProjectedSGD,
    replicas: int = 16,
    *,
    seed: int = 0,
    control: bool = True,
    execution: Execution = Execution(),
) -> Drift:
    """Drift velocity as a function of position, from short runs of projected SGD.

    Every replica of every position has independent noise. Most of a short run's displacement is
    noise of the minibatch gradients along the path, with known mean 0. It is subtracted as a
    control variate of coefficient 1: the same minibatches' gradients along the tangent at the
    start, minus their mean over all data. The result is unbiased for any loss, with second-order
    noise left.

    With batch statistics, the mean over all possible batches is estimated over the batches of one
    random order of the examples, an error common to all replicas (`order_error`). `noiseless_drift`
    uses the same batches, so it cancels to first order in the difference. Each minibatch's gradient
    is then computed twice, which doubles the cost or more.

    Args:
        obj, path: as for `relax`.
        positions: where to start, in [0, 1]; best inside segments of the path.  # [K]
        settings: of the short runs. Long ones average the drift over the positions they visit.
        replicas: R at each position, 2 or more for an interval.
        seed: of the minibatches.
        control: whether to subtract the noise along the path.
        execution: as for `relax`.

    Raises:
        ValueError: arguments out of range.
        DivergenceError: every replica diverged.

    >>> from entropic_fast import linear_path
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> obj = Objective(torch.nn.Linear(2, 1, bias=False), "mse", (x, x[:, :1]))
    >>> path = linear_path(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> settings = ProjectedSGD(0.01, 8, project_every=5, steps=5)
    >>> found = measure_drift(obj, path, [0.2, 0.6], settings, replicas=4)
    >>> found.interval(0).value > found.interval(1).value > 0, tuple(found.velocity.shape)
    (True, (2, 4))
    """
    places = torch.as_tensor(positions, dtype=torch.float64).cpu()
    if places.ndim != 1 or len(places) == 0:
        raise checks.invalid("positions", "positions [K]", checks.describe(places))
    checks.integer("replicas", replicas, 1)
    starts = places.repeat_interleave(replicas)
    ids = list(range(len(starts)))
    run = relax(obj, path, starts, settings, replicas=ids, seed=seed, execution=execution)
    raw = (run.position[:, -1] - run.position[:, 0]) / settings.effective_time  # [K R]
    velocity, error = raw, torch.zeros_like(places)
    if control:
        noise, shared = _noise_along(obj, path, places, settings, ids, replicas, seed)
        velocity = raw + noise / (settings.effective_time * path.length)
        error = shared / (settings.effective_time * path.length)
    shape = (len(places), replicas)
    return Drift(places, velocity.view(shape), raw.view(shape), error, control, settings, run)


def _noise_along(
    obj: Objective,
    path: Path,
    places: Tensor,
    settings: ProjectedSGD,
    ids: list[int],
    replicas: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Noise of the gradients along the path as displacements [K R], and their common error [K]."""
    place = torch.arange(len(places)).repeat_interleave(replicas)
    batches = Minibatches(obj, settings.batch_size, seed, ids)
    slope = _batch_slopes if _has_batch_statistics(obj) else _mean_slopes
    slopes_at, error = slope(obj, path, places, batches, place)
    # Summed where the gradients are, and read once.
    total = torch.zeros(len(ids), dtype=torch.float64, device=obj.device)
    weights = impulse_response(settings)
    for step, weight in enumerate(weights.tolist()):
        total += weight * slopes_at(step)
    return total.cpu(), error.cpu() * float(weights.sum())


def _has_batch_statistics(obj: Objective) -> bool:
    return obj.has_running_statistics or obj.norm == "batch"


# (step) -> slopes of the replicas' minibatches less the mean [K R], on the objective's device
Slopes = Callable[[int], Tensor]


def _mean_slopes(
    obj: Objective, path: Path, places: Tensor, batches: Minibatches, place: Tensor
) -> tuple[Slopes, Tensor]:
    slopes = torch.stack([tangent_gradients(obj, path, float(s)) for s in places])  # [K, N]
    slopes = (slopes - slopes.mean(1, keepdim=True)).to(obj.device)
    rows = place.to(obj.device)[:, None]

    def slopes_at(step: int) -> Tensor:
        return slopes[rows, batches.indices(step)].mean(1)

    return slopes_at, torch.zeros_like(places)


def _batch_slopes(
    obj: Objective, path: Path, places: Tensor, batches: Minibatches, place: Tensor
) -> tuple[Slopes, Tensor]:
    alike = in_random_batches(obj, batches.batch_size)
    points = [path.point(float(s)).detach() for s in places]
    tangents = [path.tangent(float(s)).double() for s in places]

    @full_precision()
    def slope(k: int, inputs: Tensor, targets: Tensor) -> Tensor:
        theta = points[k].requires_grad_()
        loss = alike.losses(theta, inputs, targets).mean()
        return torch.autograd.grad(loss, theta)[0].double() @ tangents[k]

    batch_slopes = torch.stack(
        [slope(k, b.inputs, b.targets) for k in range(len(places)) for b in alike.batches()]
    ).view(len(places), -1)  # [K, N // B]
    mean, count = batch_slopes.mean(1), batch_slopes.shape[1]

    means = mean[place.to(mean.device)]

    def slopes_at(step: int) -> Tensor:
        rows = zip(place.tolist(), *batches(step), strict=True)
        return torch.stack([slope(k, x, y) for k, x, y in rows]) - means

    if count == 1:  # a full batch is all there is
        return slopes_at, torch.zeros_like(mean)
    return slopes_at, batch_slopes.std(1) / count**0.5


@full_precision()
def tangent_gradients(obj: Objective, path: Path, position: float) -> Tensor:
    """Derivative of each example's loss along the path's unit tangent, float64.  # [N]"""
    tangent, parts = path.tangent(position), []
    for batch in obj.batches():
        theta = path.point(position).requires_grad_()
        losses = obj.losses(theta, batch.inputs, batch.targets)
        # The gradient is linear in the weights of the examples: its derivative by them, along
        # the tangent. (Forward mode would do it in one pass, for models whose parts all have it.)
        weights = torch.ones_like(losses, requires_grad=True)
        gradient = torch.autograd.grad(losses, theta, weights, create_graph=True)[0]
        parts.append(torch.autograd.grad(gradient, weights, tangent)[0])
    return torch.cat(parts).double().cpu()


def noiseless_drift(
    obj: Objective, path: Path, positions: Sequence[float] | Tensor, settings: ProjectedSGD
) -> Tensor:
    """Velocity of the same short run with gradients over all examples: the energetic part.  # [K]

    In path lengths per effective time; at steps=1, - u . grad L / length. With batch statistics the
    gradient is the mean over batches of `settings.batch_size` in one random order of the examples.
    """
    if _has_batch_statistics(obj):
        obj = in_random_batches(obj, settings.batch_size)
    velocities = []
    for start in torch.as_tensor(positions, dtype=torch.float64).tolist():
        theta, s = path.point(start)[None].clone(), start
        rate = torch.tensor([settings.rate], dtype=torch.float64, device=theta.device)
        optimizer = Optimizer(settings, rate)
        for update in range(1, settings.steps + 1):
            optimizer.update(theta, obj.gradient(theta[0])[None].contiguous())
            if update % settings.project_every == 0 or update == settings.steps:
                s, theta, _ = path.project(theta[0])
                theta = theta[None].contiguous()
        velocities.append((s - start) / settings.effective_time)
    return torch.tensor(velocities, dtype=torch.float64)
