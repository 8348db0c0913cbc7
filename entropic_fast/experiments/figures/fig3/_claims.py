"""Claims of figures 3 and 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from scipy import stats

from ...._utils.table import Table
from ...claims import NOTES, OURS, PAPER, UNDECIDED, Claim, verdict
from ...claims._intervals import (
    LEVEL,
    Array,
    bootstrap_rank_correlation,
    floats,
    mean_interval,
    mean_text,
    pairs,
)


def relaxation(relaxation: Table, curvature: Table) -> list[Claim]:
    """Starts, batch sizes, learning rates and k; direction of the drift.

    Replicas with one number share their noise over all settings, so settings are compared by
    the differences within those pairs.
    """
    runs = replicas_of(relaxation)
    a, b, c, d = ([r for r in runs if r.panel == panel] for panel in "ABCD")
    smallest, largest = _extremes(b, "batch_size")
    low, high = _extremes(c, "lr")
    often, rarely = _extremes(d, "project_every")
    return [
        *_deeper_takes_longer(a),
        *_down_the_curvature(a, curvature),
        *faster(
            "3B",
            "smaller batches relax faster",
            "at one learning rate, smaller batches relax faster (about 10 times between B = 16 "
            "and 256, in secondary notes)",
            (smallest, largest),
            lambda r: f"B = {r.batch_size}",
        ),
        *faster(
            "3C",
            "larger learning rates relax faster",
            "at one batch size, larger learning rates relax faster",
            (high, low),
            lambda r: f"lr = {r.lr:g}",
        ),
        *faster(
            "3C",
            "larger learning rates relax faster per effective time",
            "at one batch size, larger learning rates relax faster in effective time too, as a "
            "force that grows with temperature must (our reading)",
            (high, low),
            lambda r: f"lr = {r.lr:g}",
            effective=True,
        ),
        *faster(
            "3D",
            "rarer projections relax faster",
            "at equal noise, more updates k between projections relax faster, as k trades the "
            "force against the constraint to the path",
            (rarely, often),
            lambda r: f"k = {r.project_every}",
            source=NOTES,
        ),
    ]


def _extremes(runs: list[Replica], setting: str) -> list[list[Replica]]:
    """The replicas at the lowest value of a setting, and those at the highest."""
    values = [getattr(r, setting) for r in runs]
    return [
        [r for r, value in zip(runs, values, strict=True) if value == extreme(values)]
        for extreme in (min, max)
    ]


@dataclass(frozen=True)
class Replica:
    """One replica's trajectory."""

    panel: str
    replica: int
    optimizer: str
    start: float
    lr: float
    batch_size: int
    project_every: int
    step: Array
    position: Array

    @classmethod
    def of(cls, rows: Table) -> Replica:
        first = rows.rows()[0]
        settings = {field.name: first[field.name] for field in fields(cls)[:-2]}
        return cls(**settings, step=floats(rows["step"]), position=floats(rows["position"]))

    @property
    def depth(self) -> float:
        """Starting distance from the nearest end."""
        return min(self.start, 1 - self.start)

    @property
    def approach(self) -> float:
        """Displacement toward the nearest end; NaN if the replica diverged."""
        moved = self.position[-1] - self.position[0]
        return float(-moved if self.start <= 0.5 else moved)

    @property
    def speed(self) -> float:
        """`approach` per unit of effective time, up to the end of the path if it got there."""
        left = self.position if self.start <= 0.5 else 1 - self.position
        ended = np.flatnonzero(left <= 0)
        last = int(ended[0]) if len(ended) else len(left) - 1
        return float((left[0] - left[last]) / (self.lr * self.step[last])) if last else np.nan

    def arrival(self, target: float) -> float:
        """Updates until the nearest end is no farther than `target`; inf: never."""
        left = self.position if self.start <= 0.5 else 1 - self.position
        reached = np.flatnonzero(left <= target)
        return float(self.step[reached[0]]) if len(reached) else np.inf


def replicas_of(table: Table) -> list[Replica]:
    """The trajectories in a table."""
    return [Replica.of(rows) for _, rows in sorted(table.group_by("run").items())]


def _deeper_takes_longer(asked: list[Replica]) -> list[Claim]:
    # A start at an end cannot move toward it, and a diverged replica has no time of arrival.
    runs = [r for r in asked if np.isfinite(r.approach) and r.depth > 0]
    if not runs:
        return []
    depth = np.array([r.depth for r in runs])
    target = 0.8 * depth.min()
    times = np.array([r.arrival(target) for r in runs])
    arrived = np.isfinite(times)
    ranked = np.where(arrived, times, times[arrived].max(initial=0.0) + 1)  # the others last
    rho = low = high = np.nan
    if len(set(ranked)) > 1 and len(set(depth)) > 1:
        rho = float(stats.spearmanr(depth, ranked).statistic)
        low, high = bootstrap_rank_correlation(depth, ranked, np.array([r.replica for r in runs]))
    detail = (
        f"{int(arrived.sum())} of {len(runs)} replicas came within {target:.3g} of an end in "
        f"{int(runs[0].step[-1])} updates; the others rank last, and nothing "
        "is decided where fewer than half arrive"
    )
    return [
        Claim(
            "3A",
            "deeper starts take longer",
            "models that start deeper along the path take longer to relax to the end",
            "rank correlation of starting depth and time to reach the end's neighborhood",
            rho,
            low,
            high,
            verdict(low, high, 0.0) if arrived.mean() >= 0.5 else UNDECIDED,
            detail + _left_out(sum(not np.isfinite(r.approach) for r in asked)),
            samples={"replicas": len({r.replica for r in asked})},
        )
    ]


def _down_the_curvature(runs: list[Replica], curvature: Table) -> list[Claim]:
    if not runs:
        return []
    first = curvature.where(path=curvature["path"][0])
    s, trace = floats(first["s"]), floats(first["hessian_trace"])
    loss_slope = np.gradient(floats(first["loss"]), s) if len(s) > 1 else np.zeros(len(s))
    known = trace > 0  # other estimates have no logarithm
    slope = np.gradient(np.log(trace[known]), s[known]) if known.sum() > 1 else None
    agree = moving = lost = alike = 0
    starts = sorted({r.start for r in runs})
    for start in starts:
        drift = np.array([r.position[-1] - r.position[0] for r in runs if r.start == start])
        lost += int(np.isnan(drift).sum())
        drift = drift[np.isfinite(drift)]
        low, high = mean_interval(drift)
        if slope is None or not (low > 0 or high < 0):
            continue  # did not move beyond its own interval: no direction to compare
        moving += 1
        steeper = np.sign(np.interp(start, s[known], slope))
        alike += bool(steeper == np.sign(np.interp(start, s, loss_slope)))
        agree += bool(np.sign(drift.mean()) == -steeper)
    share = low = high = np.nan
    if moving:
        test = stats.binomtest(agree, moving)
        share, interval = test.statistic, test.proportion_ci(LEVEL)
        low, high = float(interval.low), float(interval.high)
    return [
        Claim(
            "3A",
            "drifts down the curvature",
            "where replicas move, they move down the Hessian trace across the path",
            "share of moving starts whose drift has the sign of -d ln(tr H)/ds",
            float(share),
            low,
            high,
            verdict(low, high, 0.5),
            f"{agree} of {moving} starts that moved beyond their interval, of {len(starts)}; "
            f"at {alike} of them the loss falls the same way, so that the direction alone does not "
            "tell noise from loss" + _left_out(lost),
            OURS,
            {"starts": len(starts)},
        )
    ]


def faster(
    figure: str,
    name: str,
    statement: str,
    fast_and_slow: tuple[list[Replica], list[Replica]],
    label: Callable[[Replica], str],
    *,
    effective: bool = False,
    source: str = PAPER,
) -> list[Claim]:
    """The claim that the first replicas relax faster than the second, by pairs of equal noise."""
    fast, slow = fast_and_slow
    if not fast or not slow or label(fast[0]) == label(slow[0]):
        return []
    a, b, lost = pairs(
        *({r.replica: r.speed if effective else r.approach for r in runs} for runs in (fast, slow))
    )
    detail = f"{label(fast[0])}: {mean_text(a)}; {label(slow[0])}: {mean_text(b)}"
    ended = sum(r.approach >= r.depth * (1 - 1e-9) for r in (*fast, *slow))
    if ended:
        detail += f"; {ended} replicas are at the end of the path, which bounds displacement"
    detail += _left_out(lost)
    low, high = mean_interval(a - b)
    return [
        Claim(
            figure,
            name,
            statement,
            "difference of speed toward the end, in path lengths per unit of updates x lr"
            if effective
            else "difference of displacement toward the end, in path lengths",
            float((a - b).mean()) if len(a) > 1 else np.nan,
            low,
            high,
            verdict(low, high, 0.0),
            detail,
            source,
            {"replicas": min(len(fast), len(slow))},
        )
    ]


def _left_out(lost: int) -> str:
    return f"; {lost} diverged replicas left out" if lost else ""
