"""The force: drift measured along the first path against the prediction from its curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ..._utils.convergence import held
from ..._utils.table import Table
from ...dynamics import (
    ForceSettings,
    ProjectedSGD,
    comparison_table,
    drift_shares,
    effective_temperature,
    fit_force,
    measure_drift,
    noiseless_drift,
    point_force,
    radial_share,
    shuffled_curvature,
)
from ...objective import Objective
from .. import _inputs as pieces
from .._executor import Progress, Task
from .._run_folder import RunFolder
from . import _style as plots


def tasks(run: RunFolder) -> list[Task]:
    """One task for each position."""
    section = run.config.force
    name = pieces.path_names(run)[0][0]
    replicas = sum(_replicas(run, k) for k in section.cycles)
    updates = replicas * max(section.cycles)
    products = 4 * section.directions + 2 * section.rest_examples + 20
    noise = (6 + 2 * section.spread_draws) * pieces.training_examples(run)
    cost = updates * (section.batch_size + 8) + pieces.curvature_work(run, products) + noise
    return [
        Task(f"force/{i}", measure, (i,), (f"path/{name}",), cost=cost)
        for i in range(section.positions)
    ]


def measure(run: RunFolder, progress: Progress, index: int) -> dict[str, Any]:
    """Prediction at one position, and bursts from there at every k."""
    section = run.config.force
    name, first, *_ = pieces.path_names(run)[0]
    path = pieces.load_path(run, name)
    obj = dynamics_objective(run, first)
    s = places(path.positions.tolist(), section.positions)[index]
    with held():  # eigenpairs need not be exact here; the table says which are not
        point = point_force(
            obj,
            path,
            s,
            ForceSettings(
                directions=section.directions,
                complement_examples=section.rest_examples,
                heterogeneity_draws=section.spread_draws,
                step=section.step,
                tol=0.05,
                max_examples=section.examples or None,
            ),
            seed=run.config.seed,
        )
    progress(0.4)
    rows: list[dict[str, object]] = []
    bursts: list[dict[str, object]] = []
    for number, k in enumerate(section.cycles):
        settings = burst_settings(run, k)
        # Replicas of other positions and other k have noise of their own.
        seed = run.config.seed + 1000 * index + number
        drift = measure_drift(obj, path, [s], settings, _replicas(run, k), seed=seed)
        still = noiseless_drift(obj, path, [s], settings)
        row = comparison_table(drift, still, [point]).rows()[0]
        heat = effective_temperature(drift, 0, point)
        radial = radial_share(obj, path, point, settings)
        rows.append(
            {
                "k": k,
                "lr": settings.lr,
                "batch_size": settings.batch_size,
                **row,
                "predicted_radial": radial.radial,
                "temperature_predicted": heat.predicted,
                "temperature_measured": heat.measured.value,
                "temperature_low": heat.measured.low,
                "temperature_high": heat.measured.high,
            }
        )
        others = float(still[0]) + point.without_replacement(settings)
        bursts += [
            {"k": k, "position": s, "replica": r, "residual": v - others}
            for r, v in enumerate(drift.velocity[0].tolist())
        ]
        progress(0.4 + 0.6 * (number + 1) / len(section.cycles))
    return {"comparison": Table.from_rows(rows), "bursts": Table.from_rows(bursts)}


def places(pivots: Sequence[float], count: int) -> list[float]:
    """Midpoints of `count` segments spread evenly over a path, the first and last among them.

    There a chord's direction is that of the curve through the pivots to second order; next to a
    pivot it is off by half the angle between segments, and the path leaves the valley's floor.

    >>> places([0.0, 0.2, 0.4, 0.8, 1.0], 3)
    [0.1, 0.6000000000000001, 0.9]
    """
    segments = np.linspace(0, len(pivots) - 2, count).round().astype(int).tolist()
    return [(pivots[i] + pivots[i + 1]) / 2 for i in segments]


def dynamics_objective(run: RunFolder, seed: int) -> Objective:
    """The objective that the dynamics has: minibatch statistics where the network keeps any."""
    obj = pieces.objective(run, pieces.minimum(run, seed))
    if not obj.has_running_statistics:
        return obj
    return obj.with_norm("batch").with_data(obj.tensors(), batch_size=run.config.force.batch_size)


def burst_settings(run: RunFolder, k: int) -> ProjectedSGD:
    """Settings at k: a third of the updates where k is not the largest, for the reason that
    `_replicas` has."""
    section, longest = run.config.force, max(run.config.force.cycles)
    steps = longest if k == longest else max(longest // 3 // k, 1) * k
    return ProjectedSGD(section.lr, section.batch_size, k, steps=steps)


def _replicas(run: RunFolder, k: int) -> int:
    """Replicas at k: a quarter where k is not the largest, because less noise gathers there."""
    section = run.config.force
    return section.replicas if k == max(section.cycles) else max(2, section.replicas // 4)


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    rows: list[dict[str, object]] = []
    bursts: list[dict[str, object]] = []
    for i in range(run.config.force.positions):
        rows += run.table(f"force/{i}", "comparison").rows()
        bursts += run.table(f"force/{i}", "bursts").rows()
    tables = {"force_comparison": Table.from_rows(rows), "force_bursts": Table.from_rows(bursts)}
    return {**tables, "force_fit": fits(**tables), "force_shares": shares(**tables)}


def fits(force_comparison: Table, force_bursts: Table) -> Table:
    """Slopes on the prediction at the largest k: of the residual drift at every k, and of what
    the bursts without noise do beyond the gradient (k = 0 in the table).

    Intervals are Student's t: over replicas, or for the bursts without noise over positions.
    """
    largest = int(force_comparison["k"].max())
    base = force_comparison.where(k=largest)
    predicted = np.asarray(base["predicted_entropic"], dtype=float)
    rows = []
    for k in sorted(set(force_comparison["k"].tolist()), reverse=True):
        fit = fit_force(predicted, residuals(force_bursts, base["position"], k))
        table = force_comparison.where(k=k)
        own = np.asarray(table["predicted_entropic"], dtype=float)
        correlation, p = shuffled_curvature(predicted, table["residual"], table["std_error"])
        rows.append(
            {
                "k": k,
                "slope": fit.slope.value,
                "low": fit.slope.low,
                "high": fit.slope.high,
                "predicted_slope": float(own @ predicted / (predicted @ predicted)),
                "chi2": fit.chi2,
                "freedom": fit.freedom,
                "p_value": fit.p_value,
                "r_squared": fit.r_squared,
                "correlation": correlation,
                "shuffled_p": p,
            }
        )
    beyond = np.asarray(base["energetic"], dtype=float) - np.asarray(base["gradient"], dtype=float)
    slope, low, high = _slope(predicted, beyond)
    unknown = dict.fromkeys(tuple(rows[0])[5:], np.nan)
    rows.append(
        {"k": 0, "slope": slope, "low": low, "high": high, "predicted_slope": 0.0, **unknown}
    )
    return Table.from_rows(rows)


def shares(force_comparison: Table, force_bursts: Table) -> Table:
    """Shares of the drift at the largest k: of its parts, which add up to 1 with what they leave
    unexplained, and of the drift under each control (`kind`).

    Parts: "entropic", of that "norm growth" by itself, "no noise" (energetic), "exclusion" of an
    epoch's minibatches. Controls: "shuffled", the entropic velocity predicted at other positions
    (mean of all cyclic shifts), and the drift at other "k".
    """
    k = int(force_comparison["k"].max())
    base = force_comparison.where(k=k)

    def column(name: str, rows: Table = base) -> np.ndarray:
        return np.asarray(rows[name], dtype=float)

    others = column("energetic") + column("predicted_exclusion")
    velocity = residuals(force_bursts, base["position"], k) + others[:, None]
    entropic, radial = column("predicted_entropic"), column("predicted_radial")
    parts = {
        "entropic": entropic - radial,
        "norm growth": radial,
        "no noise": column("energetic"),
        "exclusion": column("predicted_exclusion"),
    }
    parts["unexplained"] = column("measured") - sum(parts.values())
    shifts = [np.roll(entropic, i) for i in range(1, len(entropic))]
    controls = {"shuffled": np.mean(shifts, axis=0)}
    for other in sorted(set(force_comparison["k"].tolist()) - {k}):
        controls[f"k = {other}"] = column("measured", force_comparison.where(k=other))
    rows: list[dict[str, object]] = []
    for kind, group in (("part", parts), ("control", controls)):
        rows += [{"kind": kind, **row} for row in drift_shares(velocity, group).rows()]
    return Table.from_rows(rows)


def residuals(bursts: Table, positions: Sequence[float] | np.ndarray, k: int) -> np.ndarray:
    """Residual velocities of the replicas at every position.  # [K, R]"""
    return np.array([bursts.where(k=k, position=s)["residual"] for s in positions], dtype=float)


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least squares through the origin, with Student's interval over the points."""
    slope = float(x @ y / (x @ x))
    if len(x) < 2:
        return slope, -np.inf, np.inf
    error = np.sqrt(np.square(y - slope * x).sum() / (len(x) - 1) / (x @ x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * error)
    return slope, slope - half, slope + half


def draw(tables: dict[str, Table]) -> Figure:
    """A: measured against predicted; B: along the path; C: controls; D: shares of the drift."""
    comparison, fit = tables["force_comparison"], tables["force_fit"]
    figure, (scatter, along, controls, parts) = plots.panels(2, 2, width=4.4, height=3.3)
    base = comparison.where(k=int(comparison["k"].max()))
    row = fit.where(k=int(fit["k"].max()))
    slope, low, high = (float(row[name][0]) for name in ("slope", "low", "high"))
    unit = 10.0 ** np.floor(np.log10(np.abs(base["predicted_entropic"]).max()))
    predicted, residual = base["predicted_entropic"] / unit, base["residual"] / unit
    # Of the residual: what one order of batches leaves uncertain is in both of its terms.
    quantile = stats.t.ppf(0.975, np.asarray(base["replicas"], dtype=int) - 1)
    half = quantile * base["std_error"] / unit
    wide = plots.BAND * np.nan_to_num(np.asarray(base["predicted_error"], dtype=float)) / unit
    scatter.errorbar(
        predicted,
        residual,
        half,
        wide,
        fmt="o",
        color=plots.COLORS[0],
        capsize=2,
        label="positions",
    )
    ends = 1.15 * np.array([min(predicted.min(), 0), 0, max(predicted.max(), 0)])
    scatter.plot(ends, ends, ":", color="0.5", label="equal")
    scatter.plot(
        ends,
        slope * ends,
        "-",
        color=plots.COLORS[1],
        label=f"a = {slope:.2f} [{low:.2f}, {high:.2f}]",
    )
    edges = np.outer([low, high], ends)
    scatter.fill_between(ends, edges.min(0), edges.max(0), color=plots.COLORS[1], alpha=0.15)
    scatter.set_xlabel(f"predicted entropic velocity [{unit:.0e}]")
    scatter.set_ylabel(f"measured − energetic − exclusion [{unit:.0e}]")
    scatter.legend()
    settings = f"lr = {base['lr'][0]:g}, B = {base['batch_size'][0]}, k = {base['k'][0]}"
    plots.letter(scatter, "A", settings)
    _along(along, base)
    _controls(controls, fit)
    _shares(parts, tables["force_shares"])
    return figure


def _along(ax: Axes, base: Table) -> None:
    s = base["position"]
    total = base["energetic"] + base["predicted_entropic"] + base["predicted_exclusion"]
    middle, half = base["measured"], 0.5 * (base["high"] - base["low"])
    ax.errorbar(s, middle, half, fmt="o", color=plots.COLORS[0], capsize=2, label="measured")
    ax.plot(s, total, "-", color=plots.COLORS[1], label="predicted, all parts")
    for number, (column, label) in enumerate(
        (
            ("energetic", "energetic (no noise)"),
            ("predicted_entropic", "entropic"),
            ("predicted_exclusion", "exclusion in an epoch"),
        )
    ):
        color = plots.COLORS[2 + number]
        ax.plot(s, base[column], "--", color=color, lw=1.0, label=label)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xlabel("relative distance along the path")
    ax.set_ylabel("velocity [path lengths per effective time]")
    ax.legend()
    plots.letter(ax, "B", "drift and its parts")


def _controls(ax: Axes, fit: Table) -> None:
    labels = []
    for i, row in enumerate(fit.rows()):
        middle = float(row["slope"])  # type: ignore[arg-type]
        low, high = float(row["low"]), float(row["high"])  # type: ignore[arg-type]
        theory = float(row["predicted_slope"])  # type: ignore[arg-type]
        ax.errorbar([i], [middle], [[middle - low], [high - middle]], fmt="o", color="k", capsize=3)
        ax.plot([i], [theory], "x", color=plots.COLORS[1], ms=7)
        labels.append(f"k = {row['k']}" if row["k"] else "no noise")
    ax.plot([], [], "x", color=plots.COLORS[1], label="theory")
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_ylabel("slope on the prediction at the largest k")
    ax.legend()
    plots.letter(ax, "C", "controls")


def _shares(ax: Axes, shares: Table) -> None:
    names = shares["part"].tolist()
    for kind, color in (("part", plots.COLORS[0]), ("control", plots.COLORS[1])):
        rows = [i for i, found in enumerate(shares["kind"].tolist()) if found == kind]
        middle, low, high = (shares[name][rows] for name in ("share", "low", "high"))
        sides = np.maximum([middle - low, high - middle], 0)  # percentiles need not hold the value
        ax.errorbar(rows, middle, sides, fmt="o", color=color, capsize=3, label=f"{kind}s")
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_ylabel("share of the measured drift")
    ax.legend()
    plots.letter(ax, "D", "what explains the drift")
