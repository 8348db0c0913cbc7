"""Figure 3: relaxation along the first path, by starting point, batch size, learning rate, k."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...._utils.table import Table
from .. import _style

Label = Callable[[float], str]


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A to C of the paper's figure 3, position against updates; D (ours): by k."""
    table, bands = tables["fig3_relaxation"], tables["fig3_bands"]
    a, b, c = (table.where(panel=p) for p in "ABC")
    base = f"B = {a['batch_size'][0]}, lr = {a['lr'][0]:g}"
    panels: list[tuple[str, str, Label, str]] = [
        ("A", "start", lambda v: f"s = {v:.3f}", f"starting points ({base})"),
        ("B", "batch_size", lambda v: f"B = {v}", f"batch sizes (lr = {b['lr'][0]:g})"),
        ("C", "lr", lambda v: f"lr = {v:g}", f"learning rates (B = {c['batch_size'][0]})"),
    ]
    if "D" in table["panel"]:
        d = table.where(panel="D")
        base = f"B = {d['batch_size'][0]}, lr = {d['lr'][0]:g}"
        panels.append(("D", "project_every", lambda v: f"k = {v}", f"cycles of k updates ({base})"))
    shape = (2, 2) if len(panels) == 4 else (1, 3)
    figure, axes = _style.panels(*shape, width=4.4, height=3.3)
    for ax, (panel, column, label, title) in zip(axes, panels, strict=True):
        rows, band = table.where(panel=panel), bands.where(panel=panel)
        curves(ax, rows, band, column, label, "step")
        _style.letter(ax, panel, title)
    return figure


def curves(
    ax: Axes,
    table: Table,
    bands: Table,
    column: str,
    label: Label,
    time: str,
    colors: Sequence[object] = (),
    *,
    displaced: bool = False,
) -> None:
    """Each setting's mean over replicas with its 95 % band; each replica as a thin line.

    Positions, or with `displaced` how far they are from the start.
    """
    groups = table.group_by(column)
    for (value, rows), color in zip(
        groups.items(), colors or _style.shades(len(groups)), strict=False
    ):
        band = bands.where(**{column: value})
        origin = float(rows["start"][0]) if displaced else 0.0
        for track in rows.group_by("run").values():
            ax.plot(track[time], track["position"] - origin, color=color, lw=0.4, alpha=0.25)
        low, high, mean = (np.asarray(band[name]) - origin for name in ("low", "high", "mean"))
        ax.fill_between(band[time], low, high, color=color, alpha=0.25, lw=0)
        ax.plot(band[time], mean, color=color, lw=1.8, label=label(value))
    ax.set_xlabel("updates" if time == "step" else "effective time (updates × lr)")
    ax.set_ylabel("displacement" if displaced else "relative distance along the path")
    if len(groups) > 4:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        ax.legend()
