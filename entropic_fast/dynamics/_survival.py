"""Relaxation times as survival data: Kaplan-Meier estimates and log-rank tests."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .._utils import checks
from .._utils.table import Table
from ..ops.random_bits.streams import fold_in
from ._relaxation import RelaxationTime

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Survival:
    """Kaplan-Meier estimate of the share of replicas that have not arrived yet.

    Attributes:
        table: "time", "survival", "low", "high" (pointwise log-log intervals; NaN where the
            estimate is 0 or 1), at the times of arrival.
        median: the first time at which at most half are left; infinite if more are.
        low, high: its interval, by inverting the intervals of the survival (Brookmeyer and Crowley
            1982); infinite where they do not reach one half.
        arrived, replicas: counts.
        confidence: of the intervals.
    """

    table: Table
    median: float
    low: float
    high: float
    arrived: int
    replicas: int
    confidence: float

    def __str__(self) -> str:
        return (
            f"median {self.median:.4g} [{self.low:.4g}, {self.high:.4g}] "
            f"({100 * self.confidence:.3g} %, Kaplan-Meier); {self.arrived} of {self.replicas} "
            "arrived"
        )


def kaplan_meier(found: RelaxationTime, confidence: float = 0.95) -> Survival:
    """Survival of one setting's replicas, by `scipy.stats.ecdf`.

    Args:
        found: first-passage times; those that did not arrive are right-censored.
        confidence: of the intervals.

    >>> import torch
    >>> from entropic_fast.dynamics import Interval
    >>> nothing = Interval(0.0, 0.0, 0.0, 0.95, torch.zeros(1), "")
    >>> times, censored = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0, 0, 1, 1]).bool()
    >>> km = kaplan_meier(RelaxationTime(times, censored, nothing, False, 5.0, nothing))
    >>> km.table["time"].tolist(), km.table["survival"].tolist(), km.median
    ([1.0, 2.0], [0.75, 0.5], 2.0)
    """
    if not 0 < confidence < 1:
        raise checks.invalid("confidence", "a number between 0 and 1", checks.shown(confidence))
    data = _censored(found)
    arrived = int((~found.censored).sum())
    if arrived == 0:
        empty = Table({name: [] for name in ("time", "survival", "low", "high")})
        return Survival(empty, math.inf, math.inf, math.inf, 0, len(found.times), confidence)
    survival = stats.ecdf(data).sf
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no interval where survival is 0 or 1
        bounds = survival.confidence_interval(confidence, method="log-log")
    uncensored = np.unique(found.times[~found.censored].numpy())
    keep = np.isin(survival.quantiles, uncensored)
    time, share = survival.quantiles[keep], survival.probabilities[keep]
    low, high = bounds.low.probabilities[keep], bounds.high.probabilities[keep]
    table = Table({"time": time, "survival": share, "low": low, "high": high})

    def first(values: Array) -> float:
        below = np.flatnonzero(values <= 0.5)
        return float(time[below[0]]) if len(below) else math.inf

    # An interval is not defined where all have arrived; there none is left.
    upper = np.where(np.isnan(high), np.where(share > 0, 1.0, 0.0), high)
    lower = np.where(np.isnan(low), share, low)
    if share[-1] == 0 and np.isnan(high[-1]):
        upper[-1] = 1.0  # one more replica might have stayed
    return Survival(
        table, first(share), first(lower), first(upper), arrived, len(found.times), confidence
    )


def log_rank(a: RelaxationTime, b: RelaxationTime, *, paired: bool = False) -> tuple[float, float]:
    """Log-rank test for equal relaxation time distributions, both on one scale.

    Args:
        a, b: times of independent replicas, by `scipy.stats.logrank`.
        paired: replica r of `a` shares its noise with replica r of `b`, as equal ids in `relax` do.
            The sum of `a`'s log-rank scores is then compared with its values under exchanges within
            pairs, an exact test: all exchanges up to 16 pairs, 65,536 random ones beyond.

    Returns:
        (statistic, p): in standard deviations, below 0 where `a` arrives later than chance has it;
        and the two-sided p-value. (0, 1) where no replica arrived.

    Raises:
        ValueError: paired times that differ in number.
    """
    if bool(a.censored.all()) and bool(b.censored.all()):
        return 0.0, 1.0
    if not paired:
        result = stats.logrank(_censored(a), _censored(b))
        return float(result.statistic), float(result.pvalue)
    n = len(a.times)
    if len(b.times) != n:
        raise checks.invalid("b", f"{n} times, one for each of a's", str(len(b.times)))
    scores = _scores(a, b)
    difference = scores[:n] - scores[n:]
    scale = math.sqrt(float(np.square(difference).sum()))
    if scale == 0:
        return 0.0, 1.0
    if n <= _ALL_PAIRS:
        signs = np.where(np.arange(2**n)[:, None] >> np.arange(n) & 1, -1.0, 1.0)
    else:
        rng = np.random.default_rng(fold_in(0, "log-rank"))
        signs = rng.choice([-1.0, 1.0], (2**_ALL_PAIRS, n))
        signs[0] = 1.0  # the order found
    sums = np.abs(signs @ difference)
    observed = abs(float(difference.sum()))
    return float(difference.sum()) / scale, float(np.mean(sums >= observed - 1e-9 * scale))


_ALL_PAIRS = 16  # 2^16 exchanges


def _scores(a: RelaxationTime, b: RelaxationTime) -> Array:
    """Log-rank scores of all times: 1 if arrived, minus the pooled cumulative hazard."""
    times = np.concatenate([a.times.numpy(), b.times.numpy()])
    arrived = ~np.concatenate([a.censored.numpy(), b.censored.numpy()])
    hazard = np.zeros(len(times))
    for time in np.unique(times[arrived]):
        at_risk = times >= time
        hazard[at_risk] += (arrived & (times == time)).sum() / at_risk.sum()
    return arrived - hazard


def _censored(relaxation: RelaxationTime) -> stats.CensoredData:
    times, late = relaxation.times.numpy(), relaxation.censored.numpy()
    return stats.CensoredData(uncensored=times[~late], right=times[late])
