"""Figure 4: relaxation under different optimizers, against updates and effective time."""

from __future__ import annotations

from matplotlib.figure import Figure

from ..._utils.table import Table
from .._run_folder import RunFolder
from . import _relaxation_runs as relaxation
from . import _style as plots
from .fig3 import curves

COLORS = {"sgd": "#000000", "nesterov": "#D55E00", "adam": "#009E73"}  # the paper's order


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    table = relaxation.collect(run, run.config.relax.optimizers)
    return {
        "fig4_optimizers": table,
        "fig4_bands": relaxation.bands(table),
        "fig4_times": relaxation.times(table),
    }


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A (updates) and B (effective time) of the paper's figure 4."""
    table = tables["fig4_optimizers"]
    figure, axes = plots.panels(1, 2, width=4.4, height=3.3)
    names = list(dict.fromkeys(table["optimizer"].tolist()))
    rate = {name: float(table.where(optimizer=name)["lr"][0]) for name in names}
    for ax, time in zip(axes, ("step", "effective_time"), strict=True):
        colors = [COLORS[name] for name in names]
        curves(
            ax,
            table,
            tables["fig4_bands"],
            "optimizer",
            lambda n: f"{n}, lr = {rate[n]:g}",
            time,
            colors,
        )
    plots.letter(axes[0], "A", f"against updates (B = {table['batch_size'][0]})")
    plots.letter(axes[1], "B", "against effective time")
    return figure
