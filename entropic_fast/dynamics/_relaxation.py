"""Displacement, drift and relaxation time of trajectories, with intervals over replicas.

>>> from entropic_fast import Objective, ProjectedSGD, linear_path, relax
>>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
>>> obj = Objective(torch.nn.Linear(2, 1, bias=False), "mse", (x, x[:, :1]))
>>> path = linear_path(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
>>> sgd = ProjectedSGD(lr=0.02, batch_size=4, project_every=5, steps=60)
>>> run = relax(obj, path, 0.2, sgd, replicas=4)
>>> displacement(run).excludes_zero, drift(run, last=0.5).value > 0
(True, True)
>>> print(relaxation_time(run, target=1.0))
0.45 [0.4, 0.5] (87.5 %, median, order statistics, 4 replicas); 4 of 4 arrived
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from .._utils import checks
from .projected_sgd import Trajectory


@dataclass(frozen=True, eq=False)
class Interval:
    """A number over independent replicas, with its confidence interval.

    Attributes:
        value: the estimate, a mean or a median.
        low, high: ends of the interval; infinite where the replicas bound nothing there.
        confidence: coverage probability: for a mean, as asked for; for a median, what its order
            statistics attain, which can be less (4 replicas: 0.875).
        samples: the number of each replica.  # [R]
        kind: how the interval was made, in words.

    >>> print(Interval(0.2, 0.1, 0.3, 0.95, torch.zeros(4), "mean, Student's t"))
    0.2 [0.1, 0.3] (95 %, mean, Student's t, 4 replicas)
    """

    value: float
    low: float
    high: float
    confidence: float
    samples: Tensor
    kind: str

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] ({100 * self.confidence:.3g}"
            f" %, {self.kind}, {len(self.samples)} replicas)"
        )


def mean_interval(samples: Tensor, confidence: float = 0.95) -> Interval:
    """Mean of independent samples [R] with Student's t interval; one sample bounds nothing.

    >>> interval = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    >>> interval.value, round(interval.high, 3)
    (2.0, 4.484)
    """
    samples = _samples(samples, confidence)
    n, mean = len(samples), float(samples.mean())
    half = math.inf
    if n > 1:
        half = float(special.stdtrit(n - 1, 0.5 + confidence / 2) * samples.std()) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, confidence, samples, "mean, Student's t")


def median_interval(samples: Tensor, confidence: float = 0.95) -> Interval:
    """Median of independent samples [R] between two of their order statistics.

    The median of any continuous distribution lies between the j-th smallest and the j-th largest of
    n samples with probability 1 - 2 P(Binomial(n, 1/2) < j). j is the largest that attains
    `confidence`, or else 1, and the interval gives the probability attained. One sample bounds
    nothing; infinite ones rank.

    >>> interval = median_interval(torch.arange(10.0))
    >>> interval.value, interval.low, interval.high, round(interval.confidence, 3)
    (4.5, 1.0, 8.0, 0.979)
    """
    samples = _samples(samples, confidence)
    ordered, n = samples.sort().values, len(samples)

    def attained(j: int) -> float:
        return 1 - 2 * float(special.bdtr(j - 1, n, 0.5))

    j = max((j for j in range(1, (n + 1) // 2 + 1) if attained(j) >= confidence), default=1)
    low, high, reached = float(ordered[j - 1]), float(ordered[n - j]), attained(j)
    if n == 1:
        low, high, reached = -math.inf, math.inf, confidence
    return Interval(_median(ordered), low, high, reached, samples, "median, order statistics")


def displacement(
    trajectory: Trajectory, *, statistic: str = "mean", confidence: float = 0.95
) -> Interval:
    """Final minus initial position, over the replicas that did not diverge.

    Args:
        trajectory: of replicas that differ only in their noise.
        statistic: "mean" (Student's t interval) or "median" (order statistics).
        confidence: of the interval.

    Raises:
        ValueError: every replica diverged.
    """
    checks.one_of("statistic", statistic, ("mean", "median"))
    kept = _finished(trajectory)
    moved = kept.position[:, -1] - kept.position[:, 0]
    return (mean_interval if statistic == "mean" else median_interval)(moved, confidence)


def drift(
    trajectory: Trajectory, *, first: float = 0.0, last: float = math.inf, confidence: float = 0.95
) -> Interval:
    """Mean velocity along the path: position per unit of effective time (updates x lr).

    A replica's velocity is the least-squares slope of its position against its effective time. The
    slope means little once a replica reaches an end of the path: set `last` before that.

    Args:
        trajectory: of replicas that differ only in their noise; those that diverged are left out.
        first, last: the effective times between which to fit.
        confidence: of the Student's t interval.

    Raises:
        ValueError: every replica diverged, or fewer than two records lie between.
    """
    kept = _finished(trajectory)
    slopes = []
    for time, position in zip(kept.effective_times, kept.position, strict=True):
        use = (time >= first) & (time <= last)
        if int(use.sum()) < 2:
            raise checks.invalid(
                "first, last",
                "at least 2 records between them",
                f"{int(use.sum())} between {first} and {last}",
                f"records end at effective time {float(time[-1])}",
            )
        t, s = time[use] - time[use].mean(), position[use]
        slopes.append((t @ s) / (t @ t))
    return mean_interval(torch.stack(slopes), confidence)


@dataclass(frozen=True, eq=False)
class RelaxationTime:
    """First-passage times of replicas, some of which may not have arrived (censored).

    Attributes:
        times: effective time of each replica's first record at or beyond the target; if censored,
            the last time at which it had not arrived.  # [R]
        censored: replicas that had not arrived when the record, or their divergence,
            ended.  # [R], bool
        median: in effective time, with an interval from order statistics. Censored times count as
            their censoring time for `low` and as infinite for `high`.
        lower_bound: whether `median.value` is only a lower bound, because of censoring.
        horizon: the shortest time for which every replica was watched, or had arrived before.
        restricted_mean: mean of min(time, horizon) with Student's t interval. It has no censored
            terms, but equals the mean time only if that is far below `horizon`.
    """

    times: Tensor
    censored: Tensor
    median: Interval
    lower_bound: bool
    horizon: float
    restricted_mean: Interval

    def __str__(self) -> str:
        arrived = int((~self.censored).sum())
        sign = ">= " if self.lower_bound else ""
        return f"{sign}{self.median}; {arrived} of {len(self.times)} arrived"


def relaxation_time(
    trajectory: Trajectory,
    *,
    fraction: float = 0.5,
    target: str | float = "nearest",
    confidence: float = 0.95,
) -> RelaxationTime:
    """Effective time until a replica's distance from `target` is a fraction of its initial one.

    First passage, at the resolution of the records: |position - target| <= fraction |start -
    target|. Replicas that do not arrive are censored; those that diverge, at their last finite
    record.

    Args:
        trajectory: of replicas that differ only in their noise.
        fraction: of the distance at the start, in [0, 1).
        target: a position, or "nearest" for the end of the path nearest to each start.
        confidence: of the intervals.

    Raises:
        ValueError: a start at the target, or half-way between the ends with "nearest".
    """
    if not 0 <= fraction < 1:
        raise checks.invalid("fraction", "a number in [0, 1)", checks.shown(fraction))
    goal = _goal(trajectory.start, target)
    away = (trajectory.position - goal[:, None]).abs()  # [R, T]
    # A replica put exactly on the threshold by rounding has arrived.
    reached = away <= fraction * away[:, :1] + 1e-12
    times = trajectory.effective_times
    seen = trajectory.position.isfinite().sum(1) - 1  # index of the last finite record
    censored = ~reached.any(1)
    index = torch.where(censored, seen, reached.int().argmax(1))
    values = times.gather(1, index[:, None])[:, 0]
    watched = torch.where(censored, values, torch.inf)
    horizon = min(float(watched.min()), float(times[:, -1].min()))
    low = median_interval(values, confidence)
    high = median_interval(values.where(~censored, torch.inf), confidence)
    return RelaxationTime(
        times=values,
        censored=censored,
        median=Interval(low.value, low.low, high.high, low.confidence, values, low.kind),
        lower_bound=low.value != high.value,
        horizon=horizon,
        restricted_mean=mean_interval(values.clamp(max=horizon), confidence),
    )


def _goal(start: Tensor, target: str | float) -> Tensor:
    if target == "nearest":
        if bool((start == 0.5).any()):
            raise checks.invalid(
                "target",
                "a position, where a start is half-way between the ends",
                "'nearest' and a start of 0.5",
                "pass target=0.0 or 1.0",
            )
        goal = (start > 0.5).double()
    elif isinstance(target, int | float) and 0 <= target <= 1:
        goal = torch.full_like(start, float(target))
    else:
        raise checks.invalid("target", "'nearest' or a position in [0, 1]", checks.shown(target))
    if bool((start == goal).any()):
        raise checks.invalid(
            "target",
            "another position than the start",
            f"{float(goal[0])}",
            "a replica that starts there has no relaxation time",
        )
    return goal


def _finished(trajectory: Trajectory) -> Trajectory:
    if bool(trajectory.diverged.all()):
        raise checks.invalid("trajectory", "a replica that did not diverge", "none")
    return trajectory.select(~trajectory.diverged)


def _samples(samples: Tensor, confidence: float) -> Tensor:
    if not 0 < confidence < 1:
        raise checks.invalid("confidence", "a number between 0 and 1", checks.shown(confidence))
    samples = torch.as_tensor(samples, dtype=torch.float64)
    if samples.ndim != 1 or len(samples) == 0 or bool(samples.isnan().any()):
        raise checks.invalid(
            "samples", "numbers [R], at least one, none NaN", checks.describe(samples)
        )
    return samples


def _median(ordered: Tensor) -> float:
    n = len(ordered)
    low, high = float(ordered[(n - 1) // 2]), float(ordered[n // 2])
    return low if low == high else (low + high) / 2  # of two infinite ones, not NaN
