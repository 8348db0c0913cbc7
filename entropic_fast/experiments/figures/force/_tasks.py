"""Tasks of the figure of the force: short runs from positions along the first path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from scipy import stats

from ...._utils.convergence import held
from ...._utils.table import Table
from ....dynamics import (
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
from ....objective import Objective
from ... import _inputs
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from ..._sections import Config, Count, Distinct, Natural, Positive, Section
from .._relaxation_runs import require_segments


class Force(Section):
    """The force on projected SGD along the first path, measured and predicted.

    Short runs of max(cycles) updates start from the middles of `positions` segments, with
    `replicas` replicas. Every other k of `cycles` has a third of the updates and a quarter of the
    replicas. The temperature must be low enough for fluctuations to be linear. `examples` is the
    number of examples for curvature (0: all; the noise is always that of all); `step` is the
    spacing of finite differences along the path, in path lengths.
    """

    toml = "force"
    positions: Annotated[int, Field(ge=2)] = 6
    lr: Positive = 0.03
    batch_size: Count = 8
    cycles: Distinct[Count] = (1, 15)
    replicas: Annotated[int, Field(ge=2)] = 128
    directions: Count = 8
    rest_examples: Natural = 8
    spread_draws: Natural = 1
    examples: Natural = 0
    step: Positive = 0.002

    def check(self, config: Config) -> None:
        """A segment per position."""
        require_segments("force.positions", self.positions, config)

    def images_needed(self) -> dict[str, int]:
        """A minibatch, and the examples of curvature."""
        return {"batch_size": self.batch_size, "examples": self.examples}


def tasks(run: RunFolder) -> list[Task]:
    """One task for each position."""
    section = run.config[Force]
    name = _inputs.path_names(run)[0][0]
    replicas = sum(_replicas(run, k) for k in section.cycles)
    updates = replicas * max(section.cycles)
    products = 4 * section.directions + 2 * section.rest_examples + 20
    noise = (6 + 2 * section.spread_draws) * _inputs.training_examples(run)
    cost = updates * (section.batch_size + 8) + _inputs.curvature_work(run, products) + noise
    return [
        Task(f"force/{i}", measure, (i,), (f"path/{name}",), cost=cost)
        for i in range(section.positions)
    ]


def measure(run: RunFolder, progress: Progress, index: int) -> dict[str, Any]:
    """Prediction at one position, and bursts from there at every k."""
    section = run.config[Force]
    name, first, *_ = _inputs.path_names(run)[0]
    path = _inputs.load_path(run, name)
    obj = dynamics_objective(run, first)
    s = places(path.positions.tolist(), section.positions)[index]
    settings = ForceSettings(
        directions=section.directions,
        complement_examples=section.rest_examples,
        heterogeneity_draws=section.spread_draws,
        step=section.step,
        tol=0.05,
        max_examples=section.examples or None,
    )
    with held():  # eigenpairs need not be exact here; the table says which are not converged
        point = point_force(obj, path, s, settings, seed=run.config.seed)
    progress(0.4)
    rows: list[dict[str, object]] = []
    bursts: list[dict[str, object]] = []
    for number, k in enumerate(section.cycles):
        sgd = short_run_settings(run, k)
        # Replicas at other positions and other k have independent noise.
        seed = run.config.seed + 1000 * index + number
        drift = measure_drift(obj, path, [s], sgd, _replicas(run, k), seed=seed)
        still = noiseless_drift(obj, path, [s], sgd)
        heat = effective_temperature(drift, 0, point)
        rows.append(
            {
                "k": k,
                "lr": sgd.lr,
                "batch_size": sgd.batch_size,
                **comparison_table(drift, still, [point]).rows()[0],
                "predicted_radial": radial_share(obj, path, point, sgd).radial,
                "temperature_predicted": heat.predicted,
                "temperature_measured": heat.measured.value,
                "temperature_low": heat.measured.low,
                "temperature_high": heat.measured.high,
            }
        )
        others = float(still[0]) + point.without_replacement(sgd)
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
    """The objective of the dynamics: with minibatch statistics if the network has running ones."""
    obj = _inputs.objective(run, _inputs.minimum(run, seed))
    if not obj.has_running_statistics:
        return obj
    return obj.with_norm("batch").with_data(obj.tensors(), batch_size=run.config[Force].batch_size)


def short_run_settings(run: RunFolder, k: int) -> ProjectedSGD:
    """Settings at k: a third of the updates where k is not the largest, as for `_replicas`."""
    section, longest = run.config[Force], max(run.config[Force].cycles)
    steps = longest if k == longest else max(longest // 3 // k, 1) * k
    return ProjectedSGD(section.lr, section.batch_size, k, steps=steps)


def _replicas(run: RunFolder, k: int) -> int:
    """Replicas at k: a quarter where k is not the largest, because less noise gathers there."""
    section = run.config[Force]
    return section.replicas if k == max(section.cycles) else max(2, section.replicas // 4)


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    tasks = [f"force/{i}" for i in range(run.config[Force].positions)]
    tables = {
        f"force_{name}": Table.concatenated(run.table(task, name) for task in tasks)
        for name in ("comparison", "bursts")
    }
    return {**tables, "force_fit": fits(**tables), "force_shares": shares(**tables)}


def fits(force_comparison: Table, force_bursts: Table) -> Table:
    """Slopes on the prediction at the largest k.

    Of the residual drift at every k and, as k = 0, of the drift of short runs without noise beyond
    the gradient. Intervals are Student's t: over replicas, without noise over positions.
    """
    largest = int(force_comparison["k"].max())
    base = force_comparison.where(k=largest)
    predicted = np.asarray(base["predicted_entropic"], dtype=float)
    rows = []
    for k, table in sorted(force_comparison.group_by("k").items(), reverse=True):
        fit = fit_force(predicted, residuals(force_bursts, base["position"], k))
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
    """Shares of the drift at the largest k: of its parts, and of the drift under each control.

    Parts, which add up to 1: "entropic", of that "norm growth" by itself, "no noise" (energetic),
    "exclusion" of an epoch's minibatches, "unexplained". Controls: "shuffled", the entropic
    velocity predicted at other positions (mean of all cyclic shifts), and the drift at other "k".
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
    for other, table in sorted(force_comparison.group_by("k").items()):
        if other != k:
            controls[f"k = {other}"] = column("measured", table)
    rows: list[dict[str, object]] = []
    for kind, group in (("part", parts), ("control", controls)):
        rows += [{"kind": kind, **row} for row in drift_shares(velocity, group).rows()]
    return Table.from_rows(rows)


def residuals(bursts: Table, positions: Sequence[float] | np.ndarray, k: int) -> np.ndarray:
    """Residual velocities [K, R] of the replicas at every position."""
    return np.array([bursts.where(k=k, position=s)["residual"] for s in positions], dtype=float)


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least squares through the origin, with Student's interval over the points."""
    slope = float(x @ y / (x @ x))
    if len(x) < 2:
        return slope, -np.inf, np.inf
    error = np.sqrt(np.square(y - slope * x).sum() / (len(x) - 1) / (x @ x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * error)
    return slope, slope - half, slope + half
