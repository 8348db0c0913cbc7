"""Relaxation times as survival data: Kaplan-Meier, log-rank tests, scaling with eta, B and k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from .._utils import checks
from .._utils.table import Table
from ..ops.random_bits.streams import fold_in
from ._relaxation import RelaxationTime

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Survival:
    """Kaplan-Meier's estimate of the share of replicas that have not arrived yet.

    Attributes:
        table: "time", "survival", "low", "high" (log-log intervals, pointwise; NaN where the
            estimate is 0 or 1), at the times of arrival.
        median: the first time at which at most half are left; infinite if more are.
        low, high: its interval, by inverting the intervals of the survival (Brookmeyer and
            Crowley 1982); infinite where they do not reach one half.
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
    """Log-rank test of one relaxation time distribution.

    Both times must be on one scale (effective times, or updates).

    Args:
        a, b: times of independent replicas, by `scipy.stats.logrank`.
        paired: replica r of `a` shares its noise with replica r of `b`, as those with one id in
            `relax` do. Then the sum of `a`'s log-rank scores is compared with what exchanging
            the members of pairs makes of it, an exact test: all exchanges up to 16 pairs, 65,536
            of them drawn beyond.

    Returns:
        (statistic, p): over its standard deviation, below 0 where `a` arrives later than chance
        has it; and the two-sided p-value. (0, 1) where no replica arrived.

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
    """Log-rank scores of all times: 1 if arrived, less the hazard gathered until then (pooled)."""
    times = np.concatenate([a.times.numpy(), b.times.numpy()])
    arrived = ~np.concatenate([a.censored.numpy(), b.censored.numpy()])
    hazard = np.zeros(len(times))
    for time in np.unique(times[arrived]):
        at_risk = times >= time
        hazard[at_risk] += (arrived & (times == time)).sum() / at_risk.sum()
    return arrived - hazard


@dataclass(frozen=True, eq=False)
class Scaling:
    """Relaxation rate as a product of powers: rate = exp(intercept) prod_j x_j^exponent_j.

    Attributes:
        names: of the settings x_j.
        exponents, std_errors: of each.
        intercept: log rate where every log x_j is 0.
        shape, shape_error: Weibull's exponent; 1 is an exponential time.
        confidence, low, high: intervals of the exponents, normal, or Student's where noise is
            shared (degrees of freedom: clusters less one).
        log_likelihood: at the maximum.
        arrived, replicas: counts.
        reason: why the exponents are not identifiable, and then NaN with all other numbers; ""
            if they are.
    """

    names: tuple[str, ...]
    exponents: tuple[float, ...]
    std_errors: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    intercept: float
    shape: float
    shape_error: float
    confidence: float
    log_likelihood: float
    arrived: int
    replicas: int
    reason: str = ""

    @property
    def identifiable(self) -> bool:
        """Whether the data determine every exponent."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"not identifiable: {self.reason}"
        powers = ", ".join(
            f"{n}^({e:.3g} ± {s:.2g})"
            for n, e, s in zip(self.names, self.exponents, self.std_errors, strict=True)
        )
        return f"rate ~ {powers}; Weibull shape {self.shape:.3g} ± {self.shape_error:.2g}"


def fit_scaling(
    groups: Sequence[tuple[Mapping[str, float], RelaxationTime]],
    confidence: float = 0.95,
    *,
    replicas: Sequence[Sequence[int]] | None = None,
) -> Scaling:
    """Scaling of the relaxation rate with settings, from censored times.

    Weibull regression (accelerated failure time) by maximum likelihood: log time is
    - intercept - sum_j exponent_j log x_j + an error of Gumbel's distribution over `shape`.
    Replicas that did not arrive add the probability of that to the likelihood. Standard errors
    from the inverse Hessian H of the log-likelihood, or where noise is shared H^-1 M H^-1, M the
    spread of its gradients over clusters (Lin and Wei 1989).

    Args:
        groups: for each setting its numbers above 0, of one set of names, and its times, all in
            one unit. Names with one value everywhere cannot be fitted.
        confidence: of the intervals.
        replicas: number of every replica of each group; those with one number share their noise,
            as those with one id in `relax` do. Without it all are independent.

    Returns:
        the fit, or NaN with a `reason`: where too few settings have arrivals the likelihood grows
        without limit along some exponents (quasi-separation), and a maximizer stops anywhere.

    Raises:
        ValueError: names that differ, numbers not above 0, settings that do not vary or depend
            on one another, times of 0, fewer arrivals than parameters, or fewer than two
            clusters.

    >>> import torch
    >>> from entropic_fast.dynamics import Interval
    >>> nothing = Interval(0.0, 0.0, 0.0, 0.95, torch.zeros(1), "")
    >>> def group(lr):  # rate lr^2
    ...     g = torch.Generator().manual_seed(int(100 * lr))
    ...     times = -torch.rand(200, generator=g).double().log() / lr**2
    ...     late = times > 2.0
    ...     times = times.clamp(max=2.0)
    ...     return {"lr": lr}, RelaxationTime(times, late, nothing, False, 2.0, nothing)
    >>> found = fit_scaling([group(0.5), group(1.0), group(2.0)])
    >>> abs(found.exponents[0] - 2) < 3 * found.std_errors[0] < 0.6
    True
    """
    design = _design(groups)
    members = None if replicas is None else _clusters(replicas, groups)
    reason = _separation(design)
    if reason:
        return _not_identifiable(design, confidence, reason)
    best, reason = _maximum(design)
    curvature = _curvature(design, best)
    if not reason and not (np.isfinite(curvature).all() and np.linalg.eigvalsh(curvature)[0] > 0):
        reason = "the likelihood has no maximum"
    if reason:
        return _not_identifiable(design, confidence, reason)
    covariance: Array = np.asarray(np.linalg.inv(curvature), dtype=np.float64)
    quantile = float(stats.norm.ppf(0.5 + confidence / 2))
    if members is not None:
        covariance = _sandwich_covariance(design, best, covariance, members)
        quantile = float(stats.t.ppf(0.5 + confidence / 2, len(members) - 1))
    errors = np.sqrt(np.diag(covariance))
    spread = quantile * errors[1:-1]
    exponents, shape = best[1:-1], math.exp(best[-1])
    return Scaling(
        names=design.names,
        exponents=tuple(exponents.tolist()),
        std_errors=tuple(errors[1:-1].tolist()),
        low=tuple((exponents - spread).tolist()),
        high=tuple((exponents + spread).tolist()),
        intercept=float(best[0] - exponents @ design.center),
        shape=shape,
        shape_error=shape * float(errors[-1]),
        confidence=confidence,
        log_likelihood=-_loss(best, design)[0],
        arrived=int(design.event.sum()),
        replicas=len(design.event),
    )


@dataclass(frozen=True, eq=False)
class _Design:
    """One row per replica: 1 and the centered logs of the settings, log time, whether arrived."""

    names: tuple[str, ...]
    rows: Array
    center: Array
    log_time: Array
    event: NDArray[np.bool_]


def _design(groups: Sequence[tuple[Mapping[str, float], RelaxationTime]]) -> _Design:
    names = tuple(groups[0][0]) if groups else ()
    logs, times, arrived = [], [], []
    for values, found in groups:
        if tuple(values) != names:
            raise checks.invalid("groups", f"settings {list(names)}", str(list(values)))
        point = [math.log(checks.positive(name, float(values[name]))) for name in names]
        logs += [point] * len(found.times)
        times += found.times.tolist()
        arrived += (~found.censored).tolist()
    x, event = np.asarray(logs, dtype=np.float64), np.asarray(arrived, dtype=bool)
    if not names or np.linalg.matrix_rank(x - x.mean(0), tol=1e-9) < len(names):
        raise checks.invalid(
            "groups", "settings that vary independently of one another", str(list(names))
        )
    if min(times) <= 0 or event.sum() < len(names) + 2:
        raise checks.invalid(
            "groups",
            f"times above 0 and at least {len(names) + 2} arrivals",
            f"a least time {min(times):g} and {int(event.sum())} arrivals",
        )
    rows = np.column_stack([np.ones(len(x)), x - x.mean(0)])
    return _Design(names, rows, x.mean(0), np.log(np.asarray(times)), event)


def _likelihood(parameters: Array, design: _Design) -> tuple[float, Array]:
    """Minus the log-likelihood, and its gradient by replica."""
    shape = math.exp(parameters[-1])
    z = shape * (design.log_time + design.rows @ parameters[:-1])
    hazard = np.exp(z)
    value = hazard.sum() - (z + parameters[-1])[design.event].sum()
    residual = hazard - design.event
    gradients = np.column_stack(
        [shape * residual[:, None] * design.rows, residual * z - design.event]
    )
    return float(value), gradients


def _loss(parameters: Array, design: _Design) -> tuple[float, Array]:
    value, each = _likelihood(parameters, design)
    return value, each.sum(0)


def _separation(design: _Design) -> str:
    """Why the likelihood has no maximum at finite exponents; "" where it has.

    It grows without limit along a direction in which the rate of no replica that arrived changes,
    and that of others only falls.
    """
    arrived = np.unique(design.rows[design.event], axis=0)
    late = np.unique(design.rows[~design.event], axis=0)
    if not len(late):
        return ""
    best = optimize.linprog(
        late.sum(0),
        A_ub=np.concatenate([late, -late]),
        b_ub=np.concatenate([np.zeros(len(late)), np.ones(len(late))]),
        A_eq=arrived,
        b_eq=np.zeros(len(arrived)),
        bounds=(None, None),
    )
    if not best.success or best.fun > -1e-6:
        return ""
    settings = len(np.unique(design.rows, axis=0))
    return (
        f"no replica arrived at {settings - len(arrived)} of {settings} settings, so the data "
        "bound some exponents on one side only"
    )


def _maximum(design: _Design) -> tuple[Array, str]:
    """The parameters of most likelihood, and why they are not that ("" if they are)."""
    start = np.zeros(design.rows.shape[1] + 1)
    start[0] = math.log(design.event.sum() / np.exp(design.log_time).sum())
    result = optimize.minimize(
        _loss, start, args=(design,), jac=True, method="BFGS", options={"gtol": 1e-6}
    )
    best: Array = result.x
    # A line search may stop at rounding, at a gradient a little above its tolerance.
    if not result.success and not np.abs(result.jac).max() < 1e-4 * design.event.sum():
        return best, f"the fit did not converge ({result.message})"
    return best, ""


def _curvature(design: _Design, best: Array) -> Array:
    width = 1e-4
    hessian = np.array(
        [
            (_loss(best + width * e, design)[1] - _loss(best - width * e, design)[1]) / (2 * width)
            for e in np.eye(len(best))
        ]
    )
    symmetric: Array = (hessian + hessian.T) / 2
    return symmetric


def _sandwich_covariance(
    design: _Design, best: Array, inverse: Array, members: Sequence[NDArray[np.bool_]]
) -> Array:
    each = _likelihood(best, design)[1]
    sums = np.stack([each[rows].sum(0) for rows in members])
    meat = len(sums) / (len(sums) - 1) * sums.T @ sums
    covariance: Array = inverse @ meat @ inverse
    return covariance


def _not_identifiable(design: _Design, confidence: float, reason: str) -> Scaling:
    unknown = (math.nan,) * len(design.names)
    return Scaling(
        names=design.names,
        exponents=unknown,
        std_errors=unknown,
        low=unknown,
        high=unknown,
        intercept=math.nan,
        shape=math.nan,
        shape_error=math.nan,
        confidence=confidence,
        log_likelihood=math.nan,
        arrived=int(design.event.sum()),
        replicas=len(design.event),
        reason=reason,
    )


def _clusters(
    replicas: Sequence[Sequence[int]],
    groups: Sequence[tuple[Mapping[str, float], RelaxationTime]],
) -> list[NDArray[np.bool_]]:
    expected = [len(found.times) for _, found in groups]
    if [len(ids) for ids in replicas] != expected:
        raise checks.invalid(
            "replicas", f"{expected} numbers, as many as times", str([len(r) for r in replicas])
        )
    numbers = np.concatenate([np.asarray(ids) for ids in replicas])
    found = [numbers == number for number in np.unique(numbers)]
    if len(found) < 2:
        raise checks.invalid("replicas", "at least two different numbers", str(numbers.tolist()))
    return found


def _censored(found: RelaxationTime) -> stats.CensoredData:
    times, late = found.times.numpy(), found.censored.numpy()
    return stats.CensoredData(uncensored=times[~late], right=times[late])
