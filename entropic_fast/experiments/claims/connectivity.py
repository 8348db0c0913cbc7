"""Claims of figure 5."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ...table import Table
from .claim import Claim, verdict
from .intervals import Array, floats, mean_interval


def lmc(instability: Table) -> list[Claim]:
    """The barrier falls with k; which of loss and curvature is less stable."""
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
            "5B",
            "the barrier falls with k",
            "the loss on the line (here its barrier) falls as the branches share more epochs k [S]",
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
