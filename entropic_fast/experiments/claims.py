"""The paper's claims as tests on a run's CSV files: effect, interval, verdict.

Every claim is computed from `RUN/data/*.csv` alone, so that anyone can recompute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..table import Table

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not enough data"
LEVEL = 0.95  # of every interval
CHI_SQUARE_LEVEL = 0.01  # a density is rejected below this probability

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """One claim, tested.

    Attributes:
        figure: the figure it is about.
        name: short and unique.
        statement: what must hold, and where that is from ([S] seed document, [N] reading
            notes, [D] our decision).
        measure: what `effect` is.
        effect, low, high: effect size and its 95 % interval (NaN where there is none).
        verdict: "holds", "does not hold" or "not enough data".
        detail: what the verdict rests on.
    """

    figure: str
    name: str
    statement: str
    measure: str
    effect: float
    low: float
    high: float
    verdict: str
    detail: str


def evaluate(data: Path) -> list[Claim]:
    """Every claim whose tables are in the folder `data`, in the figures' order."""
    claims: list[Claim] = []
    for tables, test in _TESTS:
        if all((data / f"{name}.csv").exists() for name in tables):
            claims += test(*(Table.from_csv(data / f"{name}.csv") for name in tables))
    return claims


def to_json(claims: list[Claim]) -> list[dict[str, Any]]:
    """Claims as JSON holds them; NaN becomes null."""
    return [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        for row in map(asdict, claims)
    ]


# -- figure 1 ------------------------------------------------------------------------------


def _ring(ring: Table) -> list[Claim]:
    claims = []
    for name, hot in (("uniform at T = 0", False), ("analytic density at T > 0", True)):
        rows = _select(ring, ring["temperature"] > 0 if hot else ring["temperature"] == 0)
        count, expected = _floats(rows["count"]), _floats(rows["expected"])
        test = stats.chisquare(count, expected * count.sum() / expected.sum())
        claims.append(
            Claim(
                "1A",
                name,
                "at T > 0 the angular density is the analytic one [S]"
                if hot
                else "at T = 0 the angular density is uniform [S]",
                "sqrt(chi2 / N), the relative misfit",
                float(np.sqrt(test.statistic / count.sum())),
                np.nan,
                np.nan,
                HOLDS if test.pvalue > CHI_SQUARE_LEVEL else FAILS,
                f"chi-square {test.statistic:.1f} on {len(count) - 1} degrees of freedom, "
                f"p = {test.pvalue:.3g} (rejected below {CHI_SQUARE_LEVEL})",
            )
        )
    hot_rows = _select(ring, ring["temperature"] > 0)
    stiffness, count = _floats(hot_rows["stiffness"]), _floats(hot_rows["count"])
    flat = count[stiffness <= np.quantile(stiffness, 0.25)]
    stiff = count[stiffness >= np.quantile(stiffness, 0.75)]
    ratio = flat.mean() / stiff.mean()
    spread = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(1 / flat.sum() + 1 / stiff.sum())
    low, high = ratio * np.exp(-spread), ratio * np.exp(spread)
    claims.append(
        Claim(
            "1A",
            "concentrates where curvature is low",
            "at T > 0 particles gather at angles of low curvature [S]",
            "density, flattest quarter / stiffest quarter",
            float(ratio),
            float(low),
            float(high),
            _verdict(low, high, 1.0),
            f"{int(flat.sum())} and {int(stiff.sum())} particles",
        )
    )
    return claims


def _ridge(tracks: Table) -> list[Claim]:
    final = _select(tracks, tracks["time"] == tracks["time"].max())
    start = _select(tracks, tracks["time"] == tracks["time"].min())
    mean, low, high = (
        float(final["mean"][0] - start["mean"][0]),
        *_normal_interval(final["mean"][0] - start["mean"][0], final["std_error"][0]),
    )
    return [
        Claim(
            "1B",
            "drifts to the broad side",
            "a Brownian particle on a ridge is pushed towards its broad side [S]",
            "mean displacement towards the broad side",
            mean,
            low,
            high,
            _verdict(low, high, 0.0),
            f"at time {float(final['time'][0]):.3g}",
        )
    ]


# -- figure 2 ------------------------------------------------------------------------------


def _curvature(curvature: Table) -> list[Claim]:
    return [
        _rises(curvature, "2A", "hessian_trace", "hessian_trace_std_error", "Hessian trace"),
        _rises(curvature, "2A", "fisher_trace", "fisher_trace_std_error", "Fisher trace"),
        _rises(curvature, "2B", "top_eigenvalue", "top_eigenvalue_residual", "largest eigenvalue"),
    ]


def _rises(table: Table, figure: str, column: str, error: str, label: str) -> Claim:
    ratios, certain, without = [], [], 0
    for name in dict.fromkeys(table["path"].tolist()):
        rows = table.where(path=name)
        value, errors = _floats(rows[column]), _floats(rows[error])
        inner, ends = slice(1, -1), [0, -1]
        if not (value[inner].mean() > 0 and value[ends].mean() > 0):
            without += 1  # a ratio has no meaning
            certain.append(UNDECIDED)
            continue
        ratio = value[inner].mean() / value[ends].mean()
        relative = np.hypot(
            _mean_error(errors[inner]) / value[inner].mean(),
            _mean_error(errors[ends]) / value[ends].mean(),
        )
        ratios.append(ratio)
        spread = stats.norm.ppf((1 + LEVEL) / 2) * relative
        certain.append(_verdict(ratio * (1 - spread), ratio * (1 + spread), 1.0))
    effect, low, high = _geometric_mean(np.array(ratios))
    detail = f"{certain.count(HOLDS)} of {len(certain)} paths above 1 beyond their own error"
    if ratios:
        detail += f"; range {min(ratios):.2f} to {max(ratios):.2f}"
    if without:
        detail += f"; {without} without a ratio, as a mean is not above 0"
    return Claim(
        figure,
        f"{label} rises inside",
        f"the {label} rises from the ends to the interior, for every pair [S]",
        "interior mean / ends' mean, geometric mean over paths",
        effect,
        low,
        high,
        FAILS if FAILS in certain else UNDECIDED if UNDECIDED in certain else HOLDS,
        detail,
    )


def _path_loss(loss: Table) -> list[Claim]:
    shares, excess, barriers = [], [], []
    names = list(dict.fromkeys(loss["path"].tolist()))
    for name in names:
        rows = loss.where(path=name)
        path, line = (_floats(rows.where(kind=k)["loss"]) for k in ("path", "line"))
        excess.append(path.max() - max(path[0], path[-1]))
        barriers.append(line.max() - max(line[0], line[-1]))
        if barriers[-1] > 0:
            shares.append(excess[-1] / barriers[-1])
    effect, low, high = _geometric_mean(np.maximum(np.array(shares), 1e-12))
    detail = (
        f"barriers: path at most {max(excess):.3g}, line at least {min(barriers):.3g} nats, "
        f"{len(names)} paths"
    )
    if len(shares) < len(names):
        detail += f", {len(names) - len(shares)} of them left out: their line has no barrier"
    verdict = UNDECIDED
    if shares:
        verdict = HOLDS if max(shares) < 0.1 else FAILS
    return [
        Claim(
            "2C",
            "loss stays near the ends' level",
            "along the path the loss stays near the ends' level, far under the straight "
            "line's barrier (under a tenth of it, our reading) [S, D]",
            "barrier along the path / barrier of the straight line",
            effect,
            low,
            high,
            verdict,
            detail,
        )
    ]


def _spectrum(spectrum: Table) -> list[Claim]:
    positions = np.unique(_floats(spectrum["s"]))
    ends = np.isin(_floats(spectrum["s"]), positions[[0, -1]])
    above = spectrum["above_floor"].astype(bool)
    rank = spectrum["rank"].astype(int)
    value = _floats(spectrum["eigenvalue"])
    common = [r for r in np.unique(rank) if (above & (rank == r)).sum() == len(positions)]
    ratio = np.array(
        [
            np.exp(
                np.log(value[(rank == r) & ~ends]).mean() - np.log(value[(rank == r) & ends]).mean()
            )
            for r in common
        ]
    )
    share = median = low = high = np.nan
    if len(ratio):
        share = float((ratio > 1).mean())
        tail = (1 - LEVEL) / 2
        low, median, high = (float(q) for q in np.quantile(ratio, [tail, 0.5, 1 - tail]))
    return [
        Claim(
            "2D",
            "the whole spectrum shifts up",
            "the spectrum of the score matrix shifts upward in the interior, at every rank [S]",
            "interior / ends eigenvalue, median over ranks (interval: 2.5 to 97.5 % of ranks)",
            median,
            low,
            high,
            (HOLDS if share >= LEVEL else FAILS) if len(ratio) else UNDECIDED,
            f"{100 * share:.1f} % of {len(common)} ranks above the numerical floor are higher "
            "inside"
            if len(ratio)
            else "no rank is above the numerical floor at every position",
        )
    ]


# -- figures 3 and 4 -----------------------------------------------------------------------


def _relaxation(relaxation: Table, curvature: Table) -> list[Claim]:
    runs = [_Run.of(relaxation, i) for i in np.unique(relaxation["run"])]
    depth = [r for r in runs if r.panel == "A"]
    batch = sorted((r for r in runs if r.panel == "B"), key=lambda r: r.batch_size)
    rate = sorted((r for r in runs if r.panel == "C"), key=lambda r: r.lr)
    return [
        *_deeper_takes_longer(depth),
        *_down_the_curvature(depth, curvature),
        *_faster(
            "3B",
            "smaller batches relax faster",
            "at one learning rate, smaller batches relax faster [S]",
            [r for r in batch if r.batch_size == batch[0].batch_size],
            [r for r in batch if r.batch_size == batch[-1].batch_size],
            lambda r: f"B = {r.batch_size}",
        ),
        *_faster(
            "3C",
            "larger learning rates relax faster",
            "at one batch size, larger learning rates relax faster [S]",
            [r for r in rate if r.lr == rate[-1].lr],
            [r for r in rate if r.lr == rate[0].lr],
            lambda r: f"lr = {r.lr:g}",
        ),
    ]


def _optimizers(optimizers: Table) -> list[Claim]:
    runs = [_Run.of(optimizers, i) for i in np.unique(optimizers["run"])]
    claims = []
    for name in ("nesterov", "adam"):
        claims += _faster(
            "4",
            f"{name} relaxes faster",
            f"{name} relaxes faster than vanilla SGD, after as many updates [S]",
            [r for r in runs if r.optimizer == name],
            [r for r in runs if r.optimizer == "sgd"],
            lambda r: r.optimizer,
        )
    return claims


@dataclass(frozen=True)
class _Run:
    """One replica's trajectory."""

    panel: str
    optimizer: str
    start: float
    lr: float
    batch_size: int
    step: Array
    position: Array

    @classmethod
    def of(cls, table: Table, run: int) -> _Run:
        rows = table.where(run=run)
        return cls(
            str(rows["panel"][0]),
            str(rows["optimizer"][0]),
            float(rows["start"][0]),
            float(rows["lr"][0]),
            int(rows["batch_size"][0]),
            _floats(rows["step"]),
            _floats(rows["position"]),
        )

    @property
    def depth(self) -> float:
        """Starting distance from the nearest end."""
        return min(self.start, 1 - self.start)

    @property
    def approach(self) -> float:
        """Displacement towards the nearest end; NaN if the replica diverged."""
        moved = self.position[-1] - self.position[0]
        return float(-moved if self.start <= 0.5 else moved)

    def arrival(self, target: float) -> float:
        """Updates until the nearest end is no farther than `target`; inf: never."""
        left = self.position if self.start <= 0.5 else 1 - self.position
        reached = np.flatnonzero(left <= target)
        return float(self.step[reached[0]]) if len(reached) else np.inf


def _deeper_takes_longer(asked: list[_Run]) -> list[Claim]:
    # A start at an end has nowhere to go, and a diverged replica says nothing of time.
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
        low, high = _bootstrap_rank_correlation(depth, ranked)
    detail = (
        f"{int(arrived.sum())} of {len(runs)} replicas came within {target:.3g} of an end in "
        f"{int(runs[0].step[-1])} updates; the others rank last"
    )
    return [
        Claim(
            "3A",
            "deeper starts take longer",
            "models that start deeper along the path take longer to relax to the end [S]",
            "rank correlation of starting depth and time to reach the end's neighbourhood",
            rho,
            low,
            high,
            _verdict(low, high, 0.0),
            detail + _left_out(sum(not np.isfinite(r.approach) for r in asked)),
        )
    ]


def _down_the_curvature(runs: list[_Run], curvature: Table) -> list[Claim]:
    if not runs:
        return []
    first = curvature.where(path=curvature["path"][0])
    s, trace = _floats(first["s"]), _floats(first["hessian_trace"])
    known = trace > 0  # an estimate that is not has no logarithm
    slope = np.gradient(np.log(trace[known]), s[known]) if known.sum() > 1 else None
    agree, moving, lost = 0, 0, 0
    starts = sorted({r.start for r in runs})
    for start in starts:
        drift = np.array([r.position[-1] - r.position[0] for r in runs if r.start == start])
        lost += int(np.isnan(drift).sum())
        drift = drift[np.isfinite(drift)]
        low, high = _mean_interval(drift)
        if slope is None or not (low > 0 or high < 0):
            continue  # did not move beyond its own interval: no direction to compare
        moving += 1
        agree += bool(np.sign(drift.mean()) == -np.sign(np.interp(start, s[known], slope)))
    share = low = high = np.nan
    if moving:
        test = stats.binomtest(agree, moving)
        share, interval = test.statistic, test.proportion_ci(LEVEL)
        low, high = float(interval.low), float(interval.high)
    return [
        Claim(
            "3A",
            "drifts down the curvature",
            "where replicas move, they move down the Hessian trace across the path, as the "
            "effective potential says [D]",
            "share of moving starts whose drift has the sign of -d ln(tr H)/ds",
            float(share),
            low,
            high,
            _verdict(low, high, 0.5),
            f"{agree} of {moving} starts that moved beyond their interval, of {len(starts)}"
            + _left_out(lost),
        )
    ]


def _faster(
    figure: str,
    name: str,
    statement: str,
    fast: list[_Run],
    slow: list[_Run],
    label: Callable[[_Run], str],
) -> list[Claim]:
    if not fast or not slow or label(fast[0]) == label(slow[0]):
        return []
    a, b = (np.array([r.approach for r in runs]) for runs in (fast, slow))
    lost = int(np.isnan(a).sum() + np.isnan(b).sum())
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    detail = f"{label(fast[0])}: {_mean_text(a)}; {label(slow[0])}: {_mean_text(b)}"
    detail += _left_out(lost)
    effect, low, high = np.nan, np.nan, np.nan
    if len(a) > 1 and len(b) > 1:
        effect = float(a.mean() - b.mean())
        low, high = _welch_interval(a, b)
    return [
        Claim(
            figure,
            name,
            statement,
            "difference of displacement towards the end, in path lengths",
            effect,
            low,
            high,
            _verdict(low, high, 0.0),
            detail,
        )
    ]


def _left_out(lost: int) -> str:
    return f"; {lost} diverged replicas left out" if lost else ""


# -- figure 5 ------------------------------------------------------------------------------


def _lmc(instability: Table) -> list[Claim]:
    k = _floats(instability["k"])
    barrier = _floats(instability["barrier"])
    loss, eigen = (_floats(instability[f"{name}_instability"]) for name in ("loss", "eigenvalue"))
    first, last = k == k.min(), k == k.max()
    late = k >= np.median(np.unique(k))
    seeds = instability["seed"]
    lead_late = np.array(
        [(eigen - loss)[late & (seeds == seed)].mean() for seed in np.unique(seeds)]
    )
    varies = len(set(barrier)) > 1 < len(set(k))
    rho = float(stats.spearmanr(k, barrier).statistic) if varies else np.nan
    return [
        _paired(
            "5B",
            "the barrier falls with k",
            "the loss on the line falls as the branches share more epochs k [S]",
            f"loss barrier at k = {k.min():g} less that at k = {k.max():g}, nats",
            barrier[first] - barrier[last],
            f"rank correlation of barrier and k {rho:.2f}",
        ),
        _paired(
            "5D",
            "loss leads at small k",
            "at small k the loss is less stable along the line than the curvature [S]",
            f"instability of loss less that of curvature, k = {k.min():g}",
            loss[first] - eigen[first],
            f"loss {loss[first].mean():.3g}, curvature {eigen[first].mean():.3g}",
        ),
        _paired(
            "5D",
            "curvature leads at large k",
            "at large k the curvature is less stable along the line than the loss [S]",
            f"instability of curvature less that of loss, mean over k >= {k[late].min():g}",
            lead_late,
            f"curvature {eigen[late].mean():.3g}, loss {loss[late].mean():.3g}",
        ),
    ]


def _paired(
    figure: str, name: str, statement: str, measure: str, values: Array, detail: str
) -> Claim:
    known = values[np.isfinite(values)]  # an instability has no value where the ends' mean is 0
    low, high = _mean_interval(known)
    detail += f"; {len(known)} trunks"
    if len(known) < len(values):
        detail += f", {len(values) - len(known)} without a value left out"
    return Claim(
        figure,
        name,
        statement,
        measure,
        float(known.mean()) if len(known) else np.nan,
        low,
        high,
        _verdict(low, high, 0.0),
        detail,
    )


# -- statistics ----------------------------------------------------------------------------


def _verdict(low: float, high: float, null: float) -> str:
    if low > null:
        return HOLDS
    return FAILS if high < null else UNDECIDED


def _normal_interval(value: float, error: float) -> tuple[float, float]:
    spread = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(error)
    return float(value) - spread, float(value) + spread


def _mean_interval(values: Array) -> tuple[float, float]:
    """Student's interval of a mean; NaN from fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    spread = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error)
    return float(values.mean()) - spread, float(values.mean()) + spread


def _welch_interval(a: Array, b: Array) -> tuple[float, float]:
    """Welch's interval of the difference of two means (degrees of freedom by Satterthwaite)."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    difference = float(a.mean() - b.mean())
    if va + vb == 0:
        return difference, difference
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    spread = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(va + vb))
    return difference - spread, difference + spread


def _geometric_mean(values: Array) -> tuple[float, float, float]:
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    logs = np.log(values)
    low, high = _mean_interval(logs)
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def _bootstrap_rank_correlation(x: Array, y: Array) -> tuple[float, float]:
    def correlation(a: Array, b: Array) -> float:
        return float(stats.spearmanr(a, b).statistic) if len(set(a)) * len(set(b)) > 1 else 0.0

    rng = np.random.default_rng(0)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(2000)]
    values = [correlation(x[d], y[d]) for d in draws if len(set(x[d])) > 1 < len(set(y[d]))]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mean_error(errors: Array) -> float:
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def _mean_text(values: Array) -> str:
    if len(values) < 2:
        return "no interval" if len(values) == 0 else f"{values[0]:+.4f}"
    return f"{values.mean():+.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


def _select(table: Table, keep: np.ndarray) -> Table:
    return Table({name: table[name][keep] for name in table.columns})


def _floats(values: np.ndarray) -> Array:
    return np.asarray(values, dtype=np.float64)


_TESTS: tuple[tuple[tuple[str, ...], Callable[..., list[Claim]]], ...] = (
    (("fig1_ring",), _ring),
    (("fig1_ridge",), _ridge),
    (("fig2_curvature",), _curvature),
    (("fig2_loss",), _path_loss),
    (("fig2_spectrum",), _spectrum),
    (("fig3_relaxation", "fig2_curvature"), _relaxation),
    (("fig4_optimizers",), _optimizers),
    (("fig5_instability",), _lmc),
)
