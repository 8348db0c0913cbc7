"""Scaling of relaxation rates with learning rate, batch size and k, from censored times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from .._utils import checks
from ._relaxation import RelaxationTime

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Relaxation rate as a product of powers: rate = exp(intercept) prod_j x_j^exponent_j.

    Attributes:
        names: of the settings x_j.
        exponents, std_errors: of each.
        intercept: log rate where every log x_j is 0.
        shape, shape_error: Weibull's exponent; 1 for exponential times.
        confidence, low, high: intervals of the exponents: normal, or Student's t where replicas
            share noise (degrees of freedom: clusters minus one).
        log_likelihood: at the maximum.
        arrived, replicas: counts.
        reason: why the exponents are not identifiable (all other numbers are then NaN), or "".
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
    - intercept - sum_j exponent_j log x_j plus an error of Gumbel's distribution over `shape`; a
      censored replica contributes its survival probability. Standard errors are from the inverse
      Hessian H of the log-likelihood, or, where replicas share noise, from H^-1 M H^-1 with M the
      covariance of its gradients over clusters (Lin and Wei 1989).

    Args:
        groups: for each setting its values above 0, by name, and its times, all in one unit. The
            names are the same for all, and each value varies.
        confidence: of the intervals.
        replicas: number of every replica of each group; equal numbers share their noise, as equal
            ids in `relax` do. Default: all are independent.

    Returns:
        the fit, or NaN with a `reason`: where too few settings have arrivals the likelihood grows
        without limit along some exponents (quasi-separation), and has no maximum.

    Raises:
        ValueError: names that differ, numbers not above 0, settings that do not vary or depend on
            one another, times of 0, fewer arrivals than parameters, or fewer than two clusters.

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
    for values, relaxation in groups:
        if tuple(values) != names:
            raise checks.invalid("groups", f"settings {list(names)}", str(list(values)))
        point = [math.log(checks.positive(name, float(values[name]))) for name in names]
        logs += [point] * len(relaxation.times)
        times += relaxation.times.tolist()
        arrived += (~relaxation.censored).tolist()
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
    value, gradients = _likelihood(parameters, design)
    return value, gradients.sum(0)


def _separation(design: _Design) -> str:
    """Why the likelihood has no maximum at finite exponents, or "".

    It grows without limit along a direction that changes the rate of no arrived replica and lowers
    that of the others.
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
    """The maximum-likelihood parameters, and why the fit failed ("" if it did not)."""
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
    gradients = _likelihood(best, design)[1]
    sums = np.stack([gradients[rows].sum(0) for rows in members])
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
    replicas: Sequence[Sequence[int]], groups: Sequence[tuple[Mapping[str, float], RelaxationTime]]
) -> list[NDArray[np.bool_]]:
    expected = [len(relaxation.times) for _, relaxation in groups]
    if [len(ids) for ids in replicas] != expected:
        raise checks.invalid(
            "replicas", f"{expected} numbers, as many as times", str([len(r) for r in replicas])
        )
    numbers = np.concatenate([np.asarray(ids) for ids in replicas])
    members = [numbers == number for number in np.unique(numbers)]
    if len(members) < 2:
        raise checks.invalid("replicas", "at least two different numbers", str(numbers.tolist()))
    return members
