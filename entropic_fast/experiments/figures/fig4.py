"""Figure 4: relaxation under different optimizers, against updates and effective time."""

from __future__ import annotations

from matplotlib.figure import Figure as Drawing

from ..._utils.table import Table
from .._figure import PAPER, ClaimTest, Figure
from .._run_folder import RunFolder
from ..claims import Claim
from . import _relaxation_runs as relaxation
from . import _style
from ._relaxation_runs import Relax
from .fig3 import curves, faster, replicas_of

COLORS = {"sgd": "#000000", "nesterov": "#D55E00", "adam": "#009E73"}  # the paper's order


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    table = relaxation.collect(run, run.config[Relax].optimizers)
    return {
        "fig4_optimizers": table,
        "fig4_bands": relaxation.bands(table),
        "fig4_times": relaxation.times(table),
    }


def draw(tables: dict[str, Table]) -> Drawing:
    """Panels A (updates) and B (effective time) of the paper's figure 4."""
    table = tables["fig4_optimizers"]
    figure, axes = _style.panels(1, 2, width=4.4, height=3.3)
    rate = {name: rows["lr"][0] for name, rows in table.group_by("optimizer").items()}
    colors = [COLORS[name] for name in rate]
    for ax, time in zip(axes, ("step", "effective_time"), strict=True):
        curves(
            ax,
            table,
            tables["fig4_bands"],
            "optimizer",
            lambda n: f"{n}, lr = {rate[n]:g}",
            time,
            colors,
        )
    _style.letter(axes[0], "A", f"against updates (B = {table['batch_size'][0]})")
    _style.letter(axes[1], "B", "against effective time")
    return figure


def optimizers(optimizers: Table) -> list[Claim]:
    """Nesterov momentum and Adam against vanilla SGD."""
    runs = {name: replicas_of(rows) for name, rows in optimizers.group_by("optimizer").items()}
    return [
        claim
        for name in ("nesterov", "adam")
        for effective, suffix, time in (
            (False, "", ", after as many updates"),
            (True, " per effective time", " in effective time, updates x lr"),
        )
        for claim in faster(
            "4",
            f"{name} relaxes faster{suffix}",
            f"{name} relaxes faster than vanilla SGD{time}",
            (runs.get(name, []), runs.get("sgd", [])),
            lambda r: f"{r.optimizer}, lr = {r.lr:g}",
            effective=effective,
        )
    ]


FIGURE = Figure(
    name="fig4",
    command="relax",
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("fig4_optimizers",), optimizers),),
    minimum={"replicas": 3},
    title="Figure 4. Relaxation under different optimizers.",
    caption="The same start and batch size for vanilla SGD, Nesterov momentum 0.9 and Adam.",
    source=PAPER,
)
