"""Measured against predicted drift along a path: a table, a fitted proportionality, controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.table import Table
from ...objective import Objective
from ...ops.random_bits.streams import fold_in
from ...paths import Path
from .._relaxation import Interval, mean_interval
from ..projected_sgd import ProjectedSGD
from ._drift import Drift, measure_drift, noiseless_drift
from ._point_force import ForceSettings, PointForce, point_force

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ForceFit:
    """The noise-driven drift, fitted as a x predicted over positions and replicas.

    Weighted least squares through the origin, with weight 1 / variance over replicas per position.
    Each replica number gives an independent estimate from all positions; the interval is Student's
    t over them.

    Attributes:
        slope: a, with its interval.
        chi2, freedom, p_value: of the positions' means about the line, with errors from the
            replicas: a small p says that proportionality fails beyond noise.
        r_squared: share of the weighted squares of the means, about 0, that the line explains.
    """

    slope: Interval
    chi2: float
    freedom: int
    p_value: float
    r_squared: float

    def __str__(self) -> str:
        return (
            f"measured = a x predicted, a = {self.slope}; chi-square {self.chi2:.1f} on "
            f"{self.freedom} degrees (p = {self.p_value:.2g}), R^2 = {self.r_squared:.2f}"
        )


def fit_force(
    predicted: Sequence[float] | Array, measured: Array | Tensor, confidence: float = 0.95
) -> ForceFit:
    """Fit measured = a x predicted.

    Args:
        predicted: velocity at each position.  # [K]
        measured: velocities of independent replicas, minus the energetic part (and the exclusion);
            a replica with a NaN at any position is left out.  # [K, R]

    Raises:
        ValueError: other shapes, fewer than 2 replicas left, all predictions 0, or a position
            without spread.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.tensor([1.0, -2.0, 3.0]).double()
    >>> y = 0.5 * x[:, None] + 0.1 * torch.randn(3, 20, generator=g, dtype=torch.float64)
    >>> fit = fit_force(x, y)
    >>> fit.slope.low < 0.5 < fit.slope.high, fit.r_squared > 0.9, fit.freedom
    (True, True, 2)
    """
    x = np.asarray(predicted, dtype=np.float64)
    y = np.asarray(measured, dtype=np.float64)
    if x.ndim != 1 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise checks.invalid(
            "measured", "[K, R], K as many as predicted", f"{list(y.shape)} and {list(x.shape)}"
        )
    y = y[:, np.isfinite(y).all(0)]
    replicas = y.shape[1]
    if replicas < 2 or not (np.isfinite(x).all() and (x != 0).any()):
        raise checks.invalid(
            "measured, predicted",
            "2 replicas without NaN and finite predictions, one other than 0",
            f"{replicas} replicas, predictions {x.tolist()}",
        )
    variance = y.var(1, ddof=1)
    if not (variance > 0).all():
        raise checks.invalid("measured", "replicas that differ", "a position without any spread")
    weight = 1 / variance
    slopes = ((weight * x) @ y) / ((weight * x) @ x)
    slope = mean_interval(torch.from_numpy(slopes), confidence)
    means, error2 = y.mean(1), variance / replicas
    residual = means - slope.value * x
    chi2, freedom = float((residual**2 / error2).sum()), len(x) - 1
    total = float((weight * means**2).sum())
    return ForceFit(
        slope=slope,
        chi2=chi2,
        freedom=freedom,
        p_value=float(stats.chi2.sf(chi2, freedom)) if freedom else math.nan,
        r_squared=1 - float((weight * residual**2).sum()) / total if total > 0 else math.nan,
    )


def slope_with_errors(
    x: Array, x_error: Array, y: Array, y_error: Array, quantile: float
) -> tuple[float, float, float]:
    """Slope a of y = a x where both have independent normal errors of known size.

    Errors of x would bias an ordinary fit toward 0. a minimizes chi^2(a) = sum (y - a x)^2 / (s_y^2
    + a^2 s_x^2) (York 1966).

    Args:
        x, x_error, y, y_error: values and standard errors.  # [K] each
        quantile: the rise of chi^2 at the ends of the interval, such as the square of Student's t
            where y_error is from few replicas.

    Returns:
        a and its interval, which is infinite where no slope is excluded.

    >>> x = np.array([1.0, -2.0, 3.0])
    >>> a, low, high = slope_with_errors(x, 0 * x, 0.5 * x, 0 * x + 0.1, 3.84)
    >>> round(a, 3), round(high - a, 3), round(1.96 * 0.1 / math.hypot(*x), 3)
    (0.5, 0.052, 0.052)
    """
    slopes = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 20_001)[1:-1])[:, None]
    chi2 = np.square(y - slopes * x) / (np.square(y_error) + np.square(slopes * x_error))
    total = chi2.sum(1)
    best = int(total.argmin())
    outside = np.flatnonzero(total > total[best] + quantile)
    below, above = outside[outside < best], outside[outside > best]
    return (
        float(slopes[best, 0]),
        float(slopes[below[-1], 0]) if len(below) else -math.inf,
        float(slopes[above[0], 0]) if len(above) else math.inf,
    )


def shuffled_curvature(
    predicted: Sequence[float] | Array,
    measured: Sequence[float] | Array,
    std_error: Sequence[float] | Array,
    *,
    shuffles: int = 5000,
    seed: int = 0,
) -> tuple[float, float]:
    """Permutation test: does a position's own prediction explain more than those of others?

    Args:
        predicted, measured, std_error: by position.  # [K] each

    Returns:
        the weighted correlation, about 0, of measured and predicted, and the share of permutations
        of the predictions with at least that correlation, the identity included (all permutations
        if there are at most `shuffles`).

    >>> shuffled_curvature([1.0, 2.0, 3.0, 4.0], [1.1, 2.0, 2.9, 4.1], [0.1] * 4)[1]  # 1 of 24
    0.0416...
    """
    x, y, error = (np.asarray(v, dtype=np.float64) for v in (predicted, measured, std_error))
    y = y / error

    def correlation(values: Array) -> float:
        scaled = values / error
        scale = np.linalg.norm(scaled) * np.linalg.norm(y)
        return float(scaled @ y / scale) if scale > 0 else 0.0

    observed = correlation(x)
    if math.factorial(len(x)) <= shuffles:
        orders = [list(p) for p in permutations(range(len(x)))]
        correlations = [correlation(x[o]) for o in orders]
    else:
        rng = np.random.default_rng(fold_in(seed, "force", "shuffle"))
        correlations = [observed, *(correlation(rng.permutation(x)) for _ in range(shuffles - 1))]
    return observed, float(np.mean(np.asarray(correlations) >= observed - 1e-12))


def drift_shares(
    velocity: Array | Tensor,
    parts: Mapping[str, Sequence[float] | Array],
    confidence: float = 0.95,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Table:
    """The share of a measured drift that each of its parts explains.

    The share of part p is sum_k p_k m_k / sum_k m_k^2 over positions k, with m the mean velocity
    over replicas. Shares are additive, 1 for m itself, and negative for a part that points the
    other way. Noise in m counts as unexplained drift.

    Args:
        velocity: of independent replicas; NaN is left out.  # [K, R]
        parts: for each name its velocity at every position.  # [K] each
        confidence: of the percentile intervals, over resamples of every position's replicas.

    Returns:
        "part", "share", "low", "high": one row per part.

    Raises:
        ValueError: shapes that differ, or a position with fewer than 2 replicas.

    >>> force, descent = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.0, -0.5])
    >>> noise = 0.1 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    >>> velocity = (force + descent)[:, None] + noise
    >>> drift_shares(velocity, {"force": force, "descent": descent})["share"].round(1).tolist()
    [1.0, -0.0]
    """
    y = np.asarray(velocity, dtype=np.float64)
    p = {name: np.asarray(values, dtype=np.float64) for name, values in parts.items()}
    if y.ndim != 2 or not len(y) or any(values.shape != y.shape[:1] for values in p.values()):
        shapes = {name: list(values.shape) for name, values in p.items()}
        raise checks.invalid(
            "parts", f"[K] each for velocities [K, R] = {list(y.shape)}", str(shapes)
        )
    replicas = [row[np.isfinite(row)] for row in y]
    if min(len(row) for row in replicas) < 2:
        raise checks.invalid("velocity", "2 replicas at every position", f"{y}")
    rng = np.random.default_rng(fold_in(seed, "force", "shares"))
    means = [[row.mean() for row in replicas]]
    draws = [row[rng.integers(len(row), size=(resamples, len(row)))].mean(1) for row in replicas]
    every = np.concatenate([np.array(means), np.stack(draws, 1)])  # the drift itself, resamples
    scale = np.square(every).sum(1)
    rows = []
    for name, values in p.items():
        share = every @ values / scale
        low, high = np.quantile(share[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
        rows.append(
            {"part": name, "share": float(share[0]), "low": float(low), "high": float(high)}
        )
    return Table.from_rows(rows)


@dataclass(frozen=True, eq=False)
class ForceComparison:
    """Measured and predicted drift along a path.

    Attributes:
        table: one row per position; velocities in path lengths per effective time (updates x lr).
            "measured", "low", "high": of the short runs; "std_error": over their replicas alone;
            "energetic": of the same short run without noise; "gradient": - u . grad L / length;
            "predicted_entropic": at finite k; "predicted_on_path": with the noise on the path
            only (no spread); "predicted_exclusion"; "predicted_stationary" and
            "predicted_potential": for k -> infinity, of the r directions, with their own and
            with one temperature; "predicted_error": standard error of the entropic one;
            "residual": measured - energetic - predicted_exclusion, what the fit explains;
            "noise_share": of tr C in the r directions; "force_share": what they alone give of
            the entropic prediction;
            "eigenvalues_converged": 1 if all r eigenvalues met their tolerance, else 0;
            "squared_distance", "predicted_squared_distance": from the path at the short run's end.
        fit: residual = a x predicted_entropic.
        correlation, shuffled_p: of `shuffled_curvature`.
        drift: the short runs.
        forces: by position.
    """

    table: Table
    fit: ForceFit
    correlation: float
    shuffled_p: float
    drift: Drift
    forces: tuple[PointForce, ...]


def compare_force(
    obj: Objective,
    path: Path,
    positions: Sequence[float],
    settings: ProjectedSGD,
    replicas: int = 32,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    force: ForceSettings | Sequence[PointForce] = ForceSettings(),
    on_position: Callable[[int], None] | None = None,
) -> ForceComparison:
    """Measure the drift at positions, predict it, and fit the proportionality.

    Args:
        obj, path, positions, settings, replicas, seed: as for `measure_drift`.
        confidence: of the intervals.
        force: how to predict the force, or the forces at these positions, if computed before.
        on_position: called with an index after each prediction, for progress.

    Raises:
        ValueError: as `measure_drift` and `point_force`.
    """
    if isinstance(force, ForceSettings):
        forces: list[PointForce] = []
        with held() as missed:
            for i, s in enumerate(positions):
                start = forces[-1].pairs if forces else None
                forces.append(point_force(obj, path, float(s), force, seed=seed, v0=start))
                if on_position is not None:
                    on_position(i)
        warn_once(missed, "compare_force:")
    else:
        forces = list(force)
    drift = measure_drift(obj, path, positions, settings, replicas, seed=seed)
    energetic = noiseless_drift(obj, path, positions, settings)
    table = comparison_table(drift, energetic, forces, confidence)
    predicted = table["predicted_entropic"]
    others = torch.from_numpy(table["energetic"] + table["predicted_exclusion"])
    residual = drift.velocity - others[:, None]
    return ForceComparison(
        table,
        fit_force(predicted, residual, confidence),
        *shuffled_curvature(predicted, table["residual"], table["std_error"], seed=seed),
        drift,
        tuple(forces),
    )


def comparison_table(
    drift: Drift, energetic: Tensor, forces: Sequence[PointForce], confidence: float = 0.95
) -> Table:
    """The table of `ForceComparison` from its parts."""
    if len(forces) != len(drift.position):
        raise checks.invalid(
            "forces", f"one for each of the {len(drift.position)} positions", str(len(forces))
        )
    settings, rows = drift.settings, []
    distance = drift.trajectory.distance[:, -1].view(drift.velocity.shape)
    for i, (s, point) in enumerate(zip(drift.position.tolist(), forces, strict=True)):
        kept = ~drift.velocity[i].isnan()
        velocity = drift.velocity[i][kept]
        interval = drift.interval(i, confidence)
        entropic, exclusion = point.entropic(settings), point.without_replacement(settings)
        inside = point.entropic(settings, complement=False).value
        still = float(energetic[i])
        rows.append(
            {
                "position": s,
                "measured": interval.value,
                "low": interval.low,
                "high": interval.high,
                "std_error": float(velocity.std()) / math.sqrt(len(velocity)),
                "energetic": still,
                "gradient": point.energetic,
                "predicted_entropic": entropic.value,
                "predicted_error": entropic.std_error,
                "predicted_on_path": point.entropic(settings, noise_heterogeneity=False).value,
                "predicted_exclusion": exclusion,
                "predicted_stationary": point.stationary(settings),
                "predicted_potential": point.potential(settings),
                "residual": interval.value - still - exclusion,
                "noise_share": point.noise_share,
                "force_share": inside / entropic.value if entropic.value else math.nan,
                "squared_distance": float(distance[i][kept].square().mean()),
                "predicted_squared_distance": float(point.squared_distance(settings)[-1]),
                "replicas": len(velocity),
                "eigenvalues_converged": int(point.pairs.converged),
            }
        )
    return Table.from_rows(rows)
