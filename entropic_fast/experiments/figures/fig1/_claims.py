"""Claims of figure 1."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ...._utils.table import Table
from ...claims import FAILS, HOLDS, Claim, verdict
from ...claims._intervals import LEVEL, floats, normal_interval, select

CHI_SQUARE_LEVEL = 0.01  # a density is rejected below this probability


def ring(ring: Table) -> list[Claim]:
    """The ring's angular density, without noise and with it."""
    claims = []
    for name, hot in (("uniform at T = 0", False), ("analytic density at T > 0", True)):
        rows = select(ring, ring["temperature"] > 0 if hot else ring["temperature"] == 0)
        count, expected = floats(rows["count"]), floats(rows["expected"])
        test = stats.chisquare(count, expected * count.sum() / expected.sum())
        claims.append(
            Claim(
                "1A",
                name,
                f"at T {'>' if hot else '='} 0 the angular density is "
                + ("the analytic one" if hot else "uniform"),
                "sqrt(chi2 / N), the relative misfit",
                float(np.sqrt(test.statistic / count.sum())),
                np.nan,
                np.nan,
                HOLDS if test.pvalue > CHI_SQUARE_LEVEL else FAILS,
                ("" if hot else "a check of the simulation, as nothing turns a particle then; ")
                + f"chi-square {test.statistic:.1f} on {len(count) - 1} degrees of freedom, "
                f"p = {test.pvalue:.3g} (rejected below {CHI_SQUARE_LEVEL})",
            )
        )
    hot_rows = select(ring, ring["temperature"] > 0)
    stiffness, count = floats(hot_rows["stiffness"]), floats(hot_rows["count"])
    flat = count[stiffness <= np.quantile(stiffness, 0.25)]
    stiff = count[stiffness >= np.quantile(stiffness, 0.75)]
    ratio = flat.mean() / stiff.mean()
    spread = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(1 / flat.sum() + 1 / stiff.sum())
    low, high = ratio * np.exp(-spread), ratio * np.exp(spread)
    claims.append(
        Claim(
            "1A",
            "concentrates where curvature is low",
            "at T > 0 particles gather at angles of low curvature",
            "density, flattest quarter / stiffest quarter",
            float(ratio),
            float(low),
            float(high),
            verdict(low, high, 1.0),
            f"{int(flat.sum())} and {int(stiff.sum())} particles",
        )
    )
    return claims


def ridge(tracks: Table) -> list[Claim]:
    """The ridge: a drift to its broad side."""
    final = select(tracks, tracks["time"] == tracks["time"].max())
    start = select(tracks, tracks["time"] == tracks["time"].min())
    mean = float(final["mean"][0] - start["mean"][0])
    low, high = normal_interval(mean, final["std_error"][0])
    return [
        Claim(
            "1B",
            "drifts to the broad side",
            "a Brownian particle on a ridge is pushed toward its broad side",
            "mean displacement toward the broad side",
            mean,
            low,
            high,
            verdict(low, high, 0.0),
            f"at time {float(final['time'][0]):.3g}",
        )
    ]
