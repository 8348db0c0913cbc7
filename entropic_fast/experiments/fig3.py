"""Figure 3: relaxation along the first path, by starting point, batch size, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..table import Table
from . import plots, relaxation, survival
from .run import RunFolder


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    names = ["A", *(f"B-{size}" for size in run.config.relax.batch_sizes), "C"]
    table = relaxation.collect(run, names)
    survived, scaling = survival.survival(table, run.config.relax.project_every)
    found = {
        "fig3_relaxation": table,
        "fig3_times": relaxation.times(table),
        "fig3_survival": survived,
    }
    # Without enough arrivals there is nothing to fit.
    return {**found, "fig3_scaling": scaling} if scaling.num_rows else found


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A to C of the paper's figure 3: position against updates."""
    table = tables["fig3_relaxation"]
    figure, (starts, batches, rates) = plots.panels(1, 3, width=3.7, height=3.3)
    a, b, c = (table.where(panel=p) for p in "ABC")
    curves(starts, a, "start", lambda v: f"s = {v:.3f}", "step")
    curves(batches, b, "batch_size", lambda v: f"B = {v}", "step")
    curves(rates, c, "lr", lambda v: f"lr = {v:g}", "step")
    base = f"B = {a['batch_size'][0]}, lr = {a['lr'][0]:g}"
    plots.letter(starts, "A", f"starting points ({base})")
    plots.letter(batches, "B", f"batch sizes (lr = {b['lr'][0]:g})")
    plots.letter(rates, "C", f"learning rates (B = {c['batch_size'][0]})")
    return figure


def curves(
    ax: Axes,
    table: Table,
    column: str,
    label: Callable[[float], str],
    time: str,
    colours: Sequence[object] = (),
) -> None:
    """Each replica's position as a thin line, each setting's mean as a thick one."""
    values = list(dict.fromkeys(table[column].tolist()))
    for value, colour in zip(values, colours or plots.shades(len(values)), strict=False):
        rows = table.where(**{column: value})
        replicas = [rows.where(run=r) for r in np.unique(rows["run"])]
        positions = np.array([np.asarray(r["position"], dtype=float) for r in replicas])
        for track in positions:
            ax.plot(replicas[0][time], track, color=colour, lw=0.6, alpha=0.45)
        alive = np.isfinite(positions).any(0)
        mean = np.nanmean(positions[:, alive], axis=0)
        ax.plot(replicas[0][time][alive], mean, color=colour, lw=1.8, label=label(value))
    ax.set_xlabel("updates" if time == "step" else "effective time (updates × lr)")
    ax.set_ylabel("relative distance along the path")
    if len(values) > 5:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        ax.legend()
