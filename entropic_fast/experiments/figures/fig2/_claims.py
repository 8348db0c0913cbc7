"""Claims of figure 2."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ...._utils.table import Table
from ...claims import FAILS, HOLDS, UNDECIDED, Claim, verdict
from ...claims._intervals import LEVEL, floats, geometric_mean, mean_error, unconverged_text


def curvature(curvature: Table) -> list[Claim]:
    """Traces and largest eigenvalue rise inside, on every path."""
    return [
        _rises(curvature, "2A", "hessian_trace", "hessian_trace_std_error", "Hessian trace",
               " (2 to 3 times, in secondary notes)"),
        _rises(curvature, "2A", "fisher_trace", "fisher_trace_std_error", "Fisher trace", ""),
        _rises(curvature, "2B", "top_eigenvalue", "top_eigenvalue_residual", "largest eigenvalue",
               " (about 2 times, in secondary notes)"),
    ]  # fmt: skip


def _rises(table: Table, figure: str, column: str, error: str, label: str, reported: str) -> Claim:
    ratios, certain, without = [], [], 0
    for rows in table.group_by("path").values():
        value, errors = floats(rows[column]), floats(rows[error])
        inner, ends = slice(1, -1), [0, -1]
        if not (value[inner].mean() > 0 and value[ends].mean() > 0):
            without += 1  # a ratio has no meaning
            certain.append(UNDECIDED)
            continue
        ratio = value[inner].mean() / value[ends].mean()
        relative = np.hypot(
            mean_error(errors[inner]) / value[inner].mean(),
            mean_error(errors[ends]) / value[ends].mean(),
        )
        ratios.append(ratio)
        spread = stats.norm.ppf((1 + LEVEL) / 2) * relative
        certain.append(verdict(ratio * (1 - spread), ratio * (1 + spread), 1.0))
    effect, low, high = geometric_mean(np.array(ratios))
    detail = f"{certain.count(HOLDS)} of {len(certain)} paths above 1 beyond their own error"
    if ratios:
        detail += f"; range {min(ratios):.2f} to {max(ratios):.2f}"
    detail += unconverged_text(table, f"{column}_converged")
    if without:
        detail += f"; {without} without a ratio, as a mean is not above 0"
    return Claim(
        figure,
        f"{label} rises inside",
        f"the {label} rises from the ends to the interior, for every pair{reported}",
        "interior mean / ends' mean, geometric mean over paths (which share their minima)",
        effect,
        low,
        high,
        FAILS if FAILS in certain else UNDECIDED if UNDECIDED in certain else HOLDS,
        detail,
    )


def path_loss(loss: Table) -> list[Claim]:
    """The path's barrier against the straight line's."""
    shares, excess, barriers, ratios = [], [], [], []
    paths = loss.group_by("path").values()
    for rows in paths:
        path, line = (floats(rows.where(kind=k)["loss"]) for k in ("path", "line"))
        excess.append(path.max() - max(path[0], path[-1]))
        ratios.append(path.max() / max(path[0], path[-1]))
        barriers.append(line.max() - max(line[0], line[-1]))
        if barriers[-1] > 0:
            shares.append(excess[-1] / barriers[-1])
    effect, low, high = geometric_mean(np.maximum(np.array(shares), 1e-12))
    detail = (
        f"barriers: path at most {max(excess):.3g}, line at least {min(barriers):.3g} nats, "
        f"{len(paths)} paths; the highest loss on a path is {min(ratios):.2g} to {max(ratios):.2g} "
        "times its higher end's"
    )
    if len(shares) < len(paths):
        detail += f", {len(paths) - len(shares)} of them left out: their line has no barrier"
    return [
        Claim(
            "2C",
            "loss stays far under the straight line's",
            "along the path the loss stays near the ends' level, far under the straight "
            "line's barrier (under a tenth of it on every path, our reading)",
            "barrier along the path / barrier of the straight line",
            effect,
            low,
            high,
            UNDECIDED if not shares else HOLDS if max(shares) < 0.1 else FAILS,
            detail,
        )
    ]


def spectrum(spectrum: Table) -> list[Claim]:
    """Eigenvalues above the floor are higher at every inner position."""
    positions = np.unique(floats(spectrum["s"]))
    above = spectrum["above_floor"].astype(bool)
    rank = spectrum["rank"].astype(int)
    value = floats(spectrum["eigenvalue"])
    common = [r for r in np.unique(rank) if (above & (rank == r)).sum() == len(positions)]
    place = floats(spectrum["s"])
    inner = ~np.isin(positions, positions[[0, -1]])
    median = low = high = np.nan
    shares: dict[float, float] = {}
    if common:
        in_order = [np.argsort(place[rank == r]) for r in common]
        logs = np.log([value[rank == r][i] for r, i in zip(common, in_order, strict=True)])
        rise = logs[:, inner] - logs[:, ~inner].mean(1, keepdims=True)
        shares = dict(zip(positions[inner].tolist(), (rise > 0).mean(0).tolist(), strict=True))
        ratio = np.exp(rise.mean(1))
        tail = (1 - LEVEL) / 2
        low, median, high = (float(q) for q in np.quantile(ratio, [tail, 0.5, 1 - tail]))
    return [
        Claim(
            "2D",
            "the whole spectrum shifts up",
            "the spectrum of the score matrix shifts upward in the interior, at every rank "
            "(at 95 % of them, at each inner position, our reading)",
            "interior / ends eigenvalue, median over ranks (interval: 2.5 to 97.5 % of ranks)",
            median,
            low,
            high,
            (HOLDS if min(shares.values()) >= LEVEL else FAILS) if shares else UNDECIDED,
            f"of {len(common)} ranks above the numerical floor, higher than the ends' mean: "
            + ", ".join(f"{100 * share:.1f} % at s = {s:.2g}" for s, share in shares.items())
            if shares
            else "no rank is above the numerical floor at every position",
        )
    ]
