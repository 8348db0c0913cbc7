"""Drawing of the figure of the force."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ...._utils.table import Table
from .. import _style


def draw(tables: dict[str, Table]) -> Figure:
    """A: measured against predicted; B: along the path; C: controls; D: shares of the drift."""
    comparison, fit = tables["force_comparison"], tables["force_fit"]
    figure, (scatter, along, controls, parts) = _style.panels(2, 2, width=4.4, height=3.3)
    base = comparison.where(k=int(comparison["k"].max()))
    row = fit.where(k=int(fit["k"].max()))
    slope, low, high = (float(row[name][0]) for name in ("slope", "low", "high"))
    unit = 10.0 ** np.floor(np.log10(np.abs(base["predicted_entropic"]).max()))
    predicted, residual = base["predicted_entropic"] / unit, base["residual"] / unit
    # The error is the residual's: both of its terms have that of one order of batches.
    quantile = stats.t.ppf(0.975, np.asarray(base["replicas"], dtype=int) - 1)
    half = quantile * base["std_error"] / unit
    wide = _style.BAND * np.nan_to_num(np.asarray(base["predicted_error"], dtype=float)) / unit
    _style.errorbars(scatter, predicted, residual, half, _style.COLORS[0], "positions", xerr=wide)
    ends = 1.15 * np.array([min(predicted.min(), 0), 0, max(predicted.max(), 0)])
    scatter.plot(ends, ends, ":", color="0.5", label="equal")
    label = f"a = {slope:.2f} [{low:.2f}, {high:.2f}]"
    scatter.plot(ends, slope * ends, "-", color=_style.COLORS[1], label=label)
    edges = np.outer([low, high], ends)
    scatter.fill_between(ends, edges.min(0), edges.max(0), color=_style.COLORS[1], alpha=0.15)
    scatter.set(
        xlabel=f"predicted entropic velocity [{unit:.0e}]",
        ylabel=f"measured − energetic − exclusion [{unit:.0e}]",
    )
    scatter.legend()
    settings = f"lr = {base['lr'][0]:g}, B = {base['batch_size'][0]}, k = {base['k'][0]}"
    _style.letter(scatter, "A", settings)
    _along(along, base)
    _controls(controls, fit)
    _shares(parts, tables["force_shares"])
    return figure


def _along(ax: Axes, base: Table) -> None:
    s = base["position"]
    total = base["energetic"] + base["predicted_entropic"] + base["predicted_exclusion"]
    middle, half = base["measured"], 0.5 * (base["high"] - base["low"])
    _style.errorbars(ax, s, middle, half, _style.COLORS[0], "measured")
    ax.plot(s, total, "-", color=_style.COLORS[1], label="predicted, all parts")
    for color, column, label in (
        (_style.COLORS[2], "energetic", "energetic (no noise)"),
        (_style.COLORS[3], "predicted_entropic", "entropic"),
        (_style.COLORS[4], "predicted_exclusion", "exclusion in an epoch"),
    ):
        ax.plot(s, base[column], "--", color=color, lw=1.0, label=label)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set(
        xlabel="relative distance along the path",
        ylabel="velocity [path lengths per effective time]",
    )
    ax.legend()
    _style.letter(ax, "B", "drift and its parts")


def _controls(ax: Axes, fit: Table) -> None:
    labels = []
    for i, row in enumerate(fit.rows()):
        middle, low, high = row["slope"], row["low"], row["high"]
        ax.errorbar([i], [middle], [[middle - low], [high - middle]], fmt="o", color="k", capsize=3)
        ax.plot([i], [row["predicted_slope"]], "x", color=_style.COLORS[1], ms=7)
        labels.append(f"k = {row['k']}" if row["k"] else "no noise")
    ax.plot([], [], "x", color=_style.COLORS[1], label="theory")
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_ylabel("slope on the prediction at the largest k")
    ax.legend()
    _style.letter(ax, "C", "controls")


def _shares(ax: Axes, shares: Table) -> None:
    names = shares["part"].tolist()
    for kind, color in (("part", _style.COLORS[0]), ("control", _style.COLORS[1])):
        rows = [i for i, found in enumerate(shares["kind"].tolist()) if found == kind]
        middle, low, high = (shares[name][rows] for name in ("share", "low", "high"))
        sides = np.maximum([middle - low, high - middle], 0)  # percentiles may leave out the value
        ax.errorbar(rows, middle, sides, fmt="o", color=color, capsize=3, label=f"{kind}s")
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_ylabel("share of the measured drift")
    ax.legend()
    _style.letter(ax, "D", "what explains the drift")
