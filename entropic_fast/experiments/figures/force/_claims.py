"""Claims of the force: measured drift against the prediction, and its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from ...._utils.table import Table
from ....dynamics import slope_with_errors
from ...claims import FAILS, HOLDS, NOTES, OURS, UNDECIDED, Claim, verdict
from ...claims._intervals import LEVEL, floats

FACTOR = 2  # of theory within which a size agrees
SMALL = 0.5  # an interval this near 0 is far from 1, the slope of a force


def force(fit: Table, comparison: Table) -> list[Claim]:
    """Proportionality, curvature of its own place, no force at k = 1, none without noise."""
    rows = {int(row["k"]): row for row in fit.rows()}
    largest = max(rows)
    base = comparison.where(k=largest)
    return [
        _proportional(rows[largest], base),
        _size(rows[largest], base),
        _own_place(rows[largest], base),
        *([_nothing(rows[1], largest)] if 1 in rows and largest > 1 else []),
        _nothing(rows[0], largest),
    ]


def _proportional(row: dict[str, Any], base: Table) -> Claim:
    slope, low, high = (float(row[name]) for name in ("slope", "low", "high"))
    squares = floats(base["squared_distance"]) / floats(base["predicted_squared_distance"])
    entropic = floats(base["predicted_entropic"])
    same = int((entropic * floats(base["residual"]) > 0).sum())
    radial = floats(base["predicted_radial"])
    share = float(np.abs(radial).sum() / np.abs(entropic).sum())
    return Claim(
        "force",
        "drift follows the predicted force",
        "drift along the path, the energetic part and the exclusion of an epoch's minibatches "
        "subtracted, has the direction that the curvature across it predicts: a slope above 0",
        "slope a of measured on predicted, over positions and replicas (theory: 1)",
        slope,
        low,
        high,
        verdict(low, high, 0.0),
        f"the sign is the predicted one at {same} of {base.num_rows} positions; "
        f"the interval {'holds' if low <= 1 <= high else 'does not hold'} 1; chi-square about the "
        f"line {row['chi2']:.1f} on {row['freedom']} degrees "
        f"(p = {row['p_value']:.2g}); squared distance from the path "
        f"{squares.min():.2f} to {squares.max():.2f} times the predicted; "
        f"{100 * floats(base['noise_share']).mean():.0f} % of the noise in the directions found "
        f"one by one; norm growth of scale-invariant weights is {100 * share:.0f} % of the "
        "predicted force",
        OURS,
    )


def _size(row: dict[str, Any], base: Table) -> Claim:
    x, x_error, y, y_error = (
        floats(base[name])
        for name in ("predicted_entropic", "predicted_error", "residual", "std_error")
    )
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, int(base["replicas"][0]) - 1))
    slope, low, high = slope_with_errors(x, np.nan_to_num(x_error), y, y_error, quantile**2)
    if low >= 1 / FACTOR and high <= FACTOR:
        found = HOLDS
    else:
        found = FAILS if high < 1 / FACTOR or low > FACTOR else UNDECIDED
    return Claim(
        "force",
        "the force has the predicted size",
        "the drift that the energetic part leaves is the predicted one within a factor of "
        f"{FACTOR}",
        "slope a of measured on predicted, both with their errors (theory: 1)",
        slope,
        low,
        high,
        found,
        f"holds where the interval lies within {1 / FACTOR:g} to {FACTOR}; "
        f"{row['slope']:.2f} if predictions are taken for exact, whose errors are "
        f"{np.linalg.norm(np.nan_to_num(x_error)) / np.linalg.norm(x):.2g} of them",
        OURS,
    )


def _own_place(row: dict[str, Any], base: Table) -> Claim:
    p = float(row["shuffled_p"])
    return Claim(
        "force",
        "shuffled curvature does not predict the drift",
        "the prediction of a position explains its drift, not that of another",
        "weighted correlation of measured and predicted",
        float(row["correlation"]),
        np.nan,
        np.nan,
        HOLDS if p < 1 - LEVEL else UNDECIDED,
        f"{100 * p:.2g} % of permutations of {base.num_rows} positions reach it",
        OURS,
        {"positions": base.num_rows},
    )


def _nothing(row: dict[str, Any], largest: int) -> Claim:
    slope, low, high = (float(row[name]) for name in ("slope", "low", "high"))
    if low > -SMALL and high < SMALL:
        found = HOLDS
    else:
        found = FAILS if low > SMALL or high < -SMALL else UNDECIDED
    within = f"within ±{SMALL}"
    at_k = f"slope on the prediction at k = {largest}, of"
    if row["k"] == 0:
        name, source = "no force without noise", OURS
        statement = (
            "with gradients over all examples nothing pushes down the curvature (the slope is "
            f"{within}, where a force has 1)"
        )
        measure = f"{at_k} what a burst without noise does beyond the gradient along the path"
        detail = (
            f"holds where the interval lies {within}; with noise theory has 1; below 0, the burst "
            "falls short of its first gradient as it settles; interval over positions"
        )
    else:
        name, source = "no force at k = 1", NOTES
        statement = (
            "where every update is projected the fast directions never fluctuate, and the force "
            f"vanishes (the slope is {within}, where a force has 1)"
        )
        measure = f"{at_k} the same drift at k = 1"
        detail = f"holds where the interval lies {within}; at k = {largest} theory has 1"
    return Claim("force", name, statement, measure, slope, low, high, found, detail, source)
