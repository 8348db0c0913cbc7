"""Claims of figures 5 to 9."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ..._utils.table import Table
from ._claim import FAILS, HOLDS, UNDECIDED, Claim, verdict
from ._intervals import (
    Array,
    floats,
    mean_interval,
    mean_text,
    normal_interval,
    pairs,
    unconverged_text,
)


def lmc(instability: Table, figure: str = "5") -> list[Claim]:
    """The barrier falls with k; which of loss and curvature is less stable.

    Args:
        figure: 5, or the number of a figure of other networks and images.
    """
    note = "" if figure == "5" else f" (figure {figure})"
    k = floats(instability["k"])
    barrier = floats(instability["barrier"])
    loss, eigen = (floats(instability[f"{name}_instability"]) for name in ("loss", "eigenvalue"))
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
            f"{figure}B",
            f"the barrier falls with k{note}",
            "the loss on the line (here its barrier) falls as the branches share more epochs k [S]",
            f"loss barrier at k = {k.min():g} less that at k = {k.max():g}, nats",
            barrier[first] - barrier[last],
            f"rank correlation of barrier and k {rho:.2f}",
        ),
        _paired(
            f"{figure}D",
            f"loss leads at small k{note}",
            "at small k the loss is less stable along the line than the curvature [S]",
            f"instability of loss less that of curvature, k = {k.min():g}",
            loss[first] - eigen[first],
            f"loss {loss[first].mean():.3g}, curvature {eigen[first].mean():.3g}",
        ),
        _paired(
            f"{figure}D",
            f"curvature leads at large k{note}",
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
    low, high = mean_interval(known)
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
        verdict(low, high, 0.0),
        detail,
    )


def straight_line(line: Table, relaxation: Table) -> list[Claim]:
    """Figure 8: the drift between linearly connected networks."""
    sizes = [int(size) for size in np.unique(relaxation["batch_size"])]
    moved = [_toward_the_ends(relaxation.where(batch_size=size)) for size in sizes]
    few, many, lost = pairs(moved[0], moved[-1])
    known = len(sizes) > 1 and len(few) > 1
    low, high = mean_interval(few - many) if known else (np.nan, np.nan)
    eigenvalue = floats(line["eigenvalue"])
    rise = eigenvalue[1:-1].max() / eigenvalue[[0, -1]].mean()
    return [
        Claim(
            "8",
            "noise drives to the ends of a straight line",
            "on the straight line between linearly connected networks, the drift toward the "
            "nearest end is the larger the smaller the batch [D]",
            f"mean displacement toward the nearest end at B = {sizes[0]}, less that at "
            f"B = {sizes[-1]}, lr = {relaxation['lr'][0]:g}",
            float(few.mean() - many.mean()) if known else np.nan,
            low,
            high,
            verdict(low, high, 0.0),
            f"{mean_text(few)} and {mean_text(many)}, over {len(few)} replicas that share their "
            f"noise, of starts off the middle; {lost} diverged; the largest eigenvalue on the line "
            f"is at most {rise:.2f} of the ends' mean{unconverged_text(line, 'converged')}",
        )
    ]


def _toward_the_ends(rows: Table) -> dict[int, float]:
    """Mean displacement toward the nearest end over a replica's starts; NaN if one diverged."""
    moved: dict[int, list[float]] = {}
    for run in np.unique(rows["run"]):
        part = rows.where(run=run)
        position = floats(part["position"])
        if position[0] != 0.5:
            toward = (position[-1] - position[0]) * np.sign(position[0] - 0.5)
            moved.setdefault(int(part["replica"][0]), []).append(toward)
    return {replica: float(np.mean(values)) for replica, values in moved.items()}


def bad_minimum(minima: Table, loss: Table, curvature: Table, relaxation: Table) -> list[Claim]:
    """Figure 9: a minimum that generalizes badly is sharper, joined, and driven away from."""
    normal, bad = (minima.where(minimum=name).rows()[0] for name in ("normal", "bad"))
    right = np.concatenate(
        [floats(minima.where(minimum=name)["test_accuracy"]) for name in ("normal", "bad")]
    )
    lost = float(right[0] - right[1])
    variance = right * (1 - right) / max(1, int(bad["test_images"]))  # type: ignore[call-overload]
    worse = normal_interval(lost, float(np.sqrt(variance.sum())))
    trace, error = floats(curvature["hessian_trace"]), floats(curvature["hessian_trace_std_error"])
    ratio = trace[-1] / trace[0]
    relative = float(np.hypot(error[0] / trace[0], error[-1] / trace[-1]))
    sharper = normal_interval(ratio, ratio * relative)
    path, line = (floats(loss.where(kind=k)["loss"]) for k in ("path", "line"))
    excess, barrier = (x.max() - max(x[0], x[-1]) for x in (path, line))
    # Replicas of other starts see the same noise: those that begin nearest are the sample.
    nearest = float(np.max(relaxation["start"]))
    rows = relaxation.where(start=nearest)
    ends = [floats(rows.where(run=r)["position"])[[0, -1]] for r in np.unique(rows["run"])]
    drift = np.array([first - last for first, last in ends if np.isfinite(last)])
    low, high = mean_interval(drift)
    # A line without a barrier to speak of joins them as well as any path.
    share = excess / barrier if barrier > max(line[0], line[-1]) else np.nan
    return [
        Claim(
            "9",
            "the bad minimum generalizes worse",
            "a minimum that also fits wrong labels errs more on test images [D]",
            "test accuracy lost",
            lost,
            *worse,
            verdict(*worse, 0.0),
            f"test accuracy {normal['test_accuracy']:.3f} and {bad['test_accuracy']:.3f}; on the "
            f"images of the loss {normal['kept_accuracy']:.3f} and {bad['kept_accuracy']:.3f}",
        ),
        Claim(
            "9",
            "the bad minimum is joined to a normal one",
            "a path of low loss leads to it (under a tenth of the straight line's barrier) [D]",
            "barrier along the path / barrier of the straight line",
            share,
            np.nan,
            np.nan,
            UNDECIDED if not np.isfinite(share) else HOLDS if share < 0.1 else FAILS,
            f"barriers {excess:.3g} and {barrier:.3g} nats; decides nothing where the line's is "
            f"under the higher end's loss, {max(line[0], line[-1]):.3g}",
        ),
        Claim(
            "9A",
            "the bad minimum is sharper",
            "the trace of the Hessian is larger at the bad minimum [D]",
            "Hessian trace at the bad minimum / at the normal one",
            ratio,
            *sharper,
            verdict(*sharper, 1.0),
            f"{trace[0]:.3g} and {trace[-1]:.3g}, at most {trace.max():.3g} between",
        ),
        Claim(
            "9C",
            "SGD leaves the bad minimum",
            "from beside the bad minimum, projected SGD drifts along the path toward the normal "
            "one, by descent and noise together [D]",
            f"mean displacement toward the normal minimum, from s = {nearest:g}",
            float(drift.mean()) if len(drift) else np.nan,
            low,
            high,
            verdict(low, high, 0.0),
            f"{len(drift)} of {len(ends)} replicas, which did not diverge; one pair of minima",
        ),
    ]
