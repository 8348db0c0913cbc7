"""Figures of a model's profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._utils.table import Table
from ..experiments import TaskStore
from ..experiments import _plotly as interactive
from ..experiments._report import FigureEntry
from ..experiments.figures import _style as plots
from ..experiments.figures import fig2, fig3
from ._tasks import CYCLES

_STYLES: fig2.Styles = {"A-B": (plots.COLORS[0], plots.MARKERS[0], "A-B")}
_LOSSES = {
    "cross_entropy": "cross-entropy [nats]",
    "next_token": "cross-entropy [nats]",
    "bce": "binary cross-entropy [nats]",
    "mse": "mean squared error",
}
_CAPTIONS = {
    "along": (
        "Along the path from A to B.",
        "Hessian trace and largest eigenvalue on the examples for curvature, and the loss on all "
        "examples along the minimum energy path and the straight line.",
    ),
    "relaxation": (
        "Relaxation.",
        "Displacement from the start by projected SGD; thin lines are replicas, thick ones their "
        "means with 95 % intervals (Student's t) as bands. With k = 15 updates between projections "
        "the fast directions fluctuate; with k = 1, the control, they do not, and what moves is "
        "descent along the path and noise along it.",
    ),
    "spectra": (
        "Spectra.",
        "Density of the Hessian's eigenvalues (each probe's Ritz values smoothed; bands are 95 % "
        "over probes), and the eigenvalues of the empirical Fisher matrix that are above rounding.",
    ),
}


def draw(folder: TaskStore, tables: Mapping[str, Table], loss: str) -> list[FigureEntry]:
    """Draw the figures that there are tables for, with their entries of the report."""
    drawn: dict[str, tuple[Figure, tuple[str, ...]]] = {}
    with plots.look():
        if "curvature" in tables:
            label = _LOSSES.get(loss, "loss")
            drawn["along"] = _draw_along(tables, label), ("curvature", "losses")
            drawn["relaxation"] = _draw_relaxation(tables), ("relaxation", "bands", "displacement")
        names = tuple(name for name in ("density", "fisher") if name in tables)
        drawn["spectra"] = _draw_spectra(tables, names), names
        entries = []
        for name, (figure, behind) in drawn.items():
            plots.save(figure, folder.path / "figures", name)
            shown = tuple(interactive.charts(figure))
            entries.append(FigureEntry(name, *_CAPTIONS[name], behind, shown))
    return entries


def _draw_along(tables: Mapping[str, Table], label: str) -> Figure:
    figure, (trace, eigenvalue, loss) = plots.panels(1, 3, width=3.7, height=3.1)
    fig2.draw_curvature(trace, eigenvalue, tables["curvature"], _STYLES)
    fig2.draw_losses(loss, tables["losses"], _STYLES, label)
    return figure


def _draw_relaxation(tables: Mapping[str, Table]) -> Figure:
    figure, axes = plots.panels(1, len(CYCLES), width=4.4, height=3.3)
    table, bands = (_from_start(tables[name]) for name in ("relaxation", "bands"))
    for ax, name, k in zip(axes, "AB", CYCLES.values(), strict=True):
        rows, band = table.where(panel=f"k = {k}"), bands.where(panel=f"k = {k}")
        fig3.curves(ax, rows, band, "start", lambda s: f"from s = {s:g}", "step")
        ax.set_ylabel("displacement along the path")
        plots.letter(ax, name, f"k = {k}, B = {rows['batch_size'][0]}, lr = {rows['lr'][0]:g}")
    axes[1].sharey(axes[0])
    axes[1].autoscale()
    return figure


def _from_start(table: Table) -> Table:
    """Positions relative to the start, because drifts are small against the path."""
    moving = ("position", "mean", "low", "high")
    return Table({n: table[n] - table["start"] if n in moving else table[n] for n in table})


def _draw_spectra(tables: Mapping[str, Table], names: Sequence[str]) -> Figure:
    places = list(tables["density"].group_by("point"))
    count = len(places) + ("fisher" in names)
    columns = min(count, 2)  # each density has its own scale
    figure, axes = plots.panels(-(-count // columns), columns, width=4.4, height=3.1)
    for ax, letter, place, color in zip(
        axes, "ABC", places, plots.shades(len(places)), strict=False
    ):
        _draw_density(ax, tables["density"].where(point=place), color)
        at = {"point": "", "between": " between A and B"}.get(place, f" at {place}")
        plots.letter(ax, letter, f"density of the Hessian's spectrum{at}")
    if "fisher" in names:
        ax, fisher = axes[len(places)], tables["fisher"]
        curves = {place: fisher.where(point=place) for place in places}
        fig2.draw_ranked(ax, curves, "eigenvalue of the Fisher matrix")
        if len(places) > 1:
            ax.legend()
        plots.letter(ax, "ABCD"[len(places)], "spectrum of the Fisher matrix")
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure


def _draw_density(ax: Axes, rows: Table, color: Any) -> None:
    density, spread = rows["density"], plots.BAND * np.nan_to_num(rows["std_error"])
    least = 1e-9 * float(density.max())  # 0 is not on a logarithmic axis
    low, high = (np.maximum(density + sign * spread, least) for sign in (-1, 1))
    ax.fill_between(rows["eigenvalue"], low, high, color=color, alpha=0.18, lw=0)
    ax.plot(rows["eigenvalue"], np.maximum(density, least), color=color)
    ax.set(yscale="log", xlabel="eigenvalue of the Hessian", ylabel="density")
    ax.set_ylim(bottom=1e-7 * float(density.max()))
