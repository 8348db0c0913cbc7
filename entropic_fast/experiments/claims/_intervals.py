"""Intervals behind the claims, all at one level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..._utils.table import Table

LEVEL = 0.95  # of every interval

Array = NDArray[np.float64]


def normal_interval(value: float, error: float) -> tuple[float, float]:
    """A normal interval from a standard error."""
    spread = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(error)
    return float(value) - spread, float(value) + spread


def mean_interval(values: Array) -> tuple[float, float]:
    """Student's interval of a mean; NaN from fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    spread = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error)
    return float(values.mean()) - spread, float(values.mean()) + spread


def pairs(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[Array, Array, int]:
    """Numbers of the replicas that both settings have, in one order, and how many have a NaN."""
    shared = [key for key in a if key in b and np.isfinite(a[key]) and np.isfinite(b[key])]
    lost = sum(not np.isfinite(v) for v in (*a.values(), *b.values()))
    return np.array([a[key] for key in shared]), np.array([b[key] for key in shared]), lost


def geometric_mean(values: Array) -> tuple[float, float, float]:
    """Geometric mean and its interval by Student's t on the logarithms; NaN from nothing."""
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    logs = np.log(values)
    low, high = mean_interval(logs)
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def bootstrap_rank_correlation(
    x: Array, y: Array, clusters: NDArray[np.int64]
) -> tuple[float, float]:
    """Percentile interval of Spearman's correlation over 2,000 resamples of the clusters.

    NaN for fewer than two clusters.
    """
    if len(set(clusters)) < 2:
        return np.nan, np.nan

    def correlation(a: Array, b: Array) -> float:
        return float(stats.spearmanr(a, b).statistic) if len(set(a)) * len(set(b)) > 1 else 0.0

    rng = np.random.default_rng(0)
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    draws = [
        np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        for _ in range(2000)
    ]
    values = [correlation(x[d], y[d]) for d in draws if len(set(x[d])) > 1 < len(set(y[d]))]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_error(errors: Array) -> float:
    """Standard error of a mean of independent numbers from theirs."""
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def mean_text(values: Array) -> str:
    """A mean ± its standard error, for a claim's detail."""
    if len(values) < 2:
        return "no interval" if len(values) == 0 else f"{values[0]:+.4g}"
    return f"{values.mean():+.3g} ± {values.std(ddof=1) / np.sqrt(len(values)):.2g}"


def select(table: Table, keep: np.ndarray) -> Table:
    """The rows of a table where `keep` is true."""
    return Table({name: table[name][keep] for name in table.columns})


def unconverged_text(table: Table, column: str) -> str:
    """How many values a column of flags says are not converged; "" for none or no such column.

    >>> unconverged_text(Table({"ok": [1, 0, 1]}), "ok")
    '; 1 of 3 values not converged'
    """
    bad = int((table[column] == 0).sum()) if column in table.columns else 0
    return f"; {bad} of {table.num_rows} values not converged" if bad else ""


def floats(values: np.ndarray) -> Array:
    """A column in float64."""
    return np.asarray(values, dtype=np.float64)
