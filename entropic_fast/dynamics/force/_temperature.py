"""Effective temperature, measured by the squared distance from the path that noise causes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._utils import checks
from .._relaxation import Interval, mean_interval
from ._drift import Drift
from ._point_force import PointForce


@dataclass(frozen=True, eq=False)
class Temperature:
    """Effective temperature at a position.

    Attributes:
        predicted: T = lr c / (2 B (1 - momentum)) in units of the loss, with c the noise-weighted
            mean noise of the r directions.
        measured: `predicted` times `ratio`, with an interval over replicas.
        ratio: measured over predicted mean squared distance from the path just before a projection,
            with its interval: 1 where the linear theory holds.
        squared_distance: predicted, at the end of the short run.
    """

    predicted: float
    measured: Interval
    ratio: Interval
    squared_distance: float


def effective_temperature(
    drift: Drift,
    index: int,
    point: PointForce,
    *,
    noise_heterogeneity: bool = False,
    confidence: float = 0.95,
) -> Temperature:
    """Temperature from the fluctuations at one position of measured short runs.

    A free direction of stiffness lambda_i has E w_i^2 = T_i / lambda_i (small lr). After k updates
    from rest it has a known fraction of that (`response`), so E |w|^2 before a projection is linear
    in the temperatures, and their measured common multiple is the ratio. Each replica contributes
    the mean over the projections of its full cycles.

    Args:
        drift: measured with the projections recorded.
        index: which position.
        point: the force at that position.
        noise_heterogeneity: whether the prediction lets noise grow away from the path.
        confidence: of the intervals.

    Raises:
        ValueError: a force of another position, or no replica left.
    """
    s = float(drift.position[index])
    if abs(point.position - s) > 1e-9:
        raise checks.invalid("point", f"the force at s = {s:g}", f"that at {point.position:g}")
    settings, run = drift.settings, drift.trajectory
    replicas = drift.velocity.shape[1]
    rows = run.distance[index * replicas : (index + 1) * replicas]  # [R, T]
    expected = point.squared_distance(settings, noise_heterogeneity=noise_heterogeneity)  # [n]
    # A record holds the distance at the projection it follows; the start holds none.
    steps = run.steps[1:] - 1
    ratios = rows[:, 1:].square().sum(1) / float(expected[steps].sum())
    ratios = ratios[~ratios.isnan()]
    if len(ratios) == 0:
        raise checks.invalid("drift", "a replica that did not diverge", "none")
    ratio = mean_interval(ratios, confidence)
    # The directions weigh as the noise puts squares into them.
    weights = point.noise[:-1] / point.noise[:-1].sum()
    predicted = float((weights * point.temperatures(settings)).sum())
    return Temperature(predicted, _scaled(ratio, predicted), ratio, float(expected[-1]))


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(
        interval.value * factor,
        interval.low * factor,
        interval.high * factor,
        interval.confidence,
        torch.as_tensor(interval.samples) * factor,
        interval.kind,
    )
