"""Claims of figures 5 to 7."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ...._utils.table import Table
from ...claims import Claim, verdict
from ...claims._intervals import Array, floats, mean_interval


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
            "the loss on the line (here its barrier) falls as the branches share more epochs k",
            f"loss barrier at k = {k.min():g} less that at k = {k.max():g}, nats",
            barrier[first] - barrier[last],
            f"rank correlation of barrier and k {rho:.2f}",
        ),
        _paired(
            f"{figure}D",
            f"loss leads at small k{note}",
            "at small k the loss is less stable along the line than the curvature",
            f"instability of loss less that of curvature, k = {k.min():g}",
            loss[first] - eigen[first],
            f"loss {loss[first].mean():.3g}, curvature {eigen[first].mean():.3g}",
        ),
        _paired(
            f"{figure}D",
            f"curvature leads at large k{note}",
            "at large k the curvature is less stable along the line than the loss",
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
        samples={"trunks": len(values)},
    )
