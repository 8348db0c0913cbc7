"""Figure 8 (ours): relaxation along the straight line between linearly connected networks."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from matplotlib.figure import Figure

from ..._utils.table import Table
from ...objective import Objective
from ...paths import linear_path
from .. import _inputs as pieces
from .._executor import Progress, Task
from .._run_folder import RunFolder
from . import _relaxation_runs as relaxation
from . import _style as plots
from .fig3 import curves


def tasks(run: RunFolder) -> list[Task]:
    """One task for each batch size."""
    section = run.config.straight_line
    updates = len(section.starts) * section.replicas * section.steps
    return [
        Task(f"straight-line/B-{b}", relax_straight, (b,), (_ends(run),), float(updates * (b + 8)))
        for b in section.batch_sizes
    ]


def _ends(run: RunFolder) -> str:
    """The task whose branches are the line's ends."""
    return f"lmc/s{run.config.lmc.seeds[0]}-k{pieces.straight_line_epoch(run)}"


def relax_straight(run: RunFolder, progress: Progress, batch_size: int) -> dict[str, Any]:
    """Projected SGD on the line, from every start."""
    section, lmc = run.config.straight_line, run.config.lmc
    objectives: list[Objective] = []
    for branch in ("branch1", "branch2"):
        model = pieces.network(run, lmc.model, lmc.data)
        model.load_state_dict(run.tensors(_ends(run), branch))
        objectives.append(pieces.objective(run, model, pieces.images(run, lmc.data)[0]))
    a, b = (objective.parameters_vector() for objective in objectives)
    path = linear_path(a, b)
    setup = relaxation.relaxation_setup(run, objectives[0], path, section.steps, section.replicas)
    settings = [(s, section.lr) for s in section.starts for _ in range(section.replicas)]
    task = f"straight-line/B-{batch_size}"
    return {
        "trajectory": relaxation.along(run, progress, task, "8", setup, settings, batch_size),
    }


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    sizes = run.config.straight_line.batch_sizes
    table = relaxation.collect(run, [f"B-{b}" for b in sizes], stage="straight-line")
    return {
        "fig8_line": run.table(_ends(run), "line"),
        "fig8_relaxation": table,
        "fig8_bands": relaxation.bands(table),
    }


def draw(tables: dict[str, Table]) -> Figure:
    """A: loss and largest eigenvalue on the line; then relaxation by batch size, for each start."""
    line, table, bands = (tables[f"fig8_{name}"] for name in ("line", "relaxation", "bands"))
    starts = list(dict.fromkeys(table["start"].tolist()))
    figure, (along, *tracks) = plots.panels(1, 1 + len(starts), width=3.9, height=3.3)
    along.plot(line["point"], line["eigenvalue"], "o-", color=plots.COLORS[1])
    along.set_ylabel("largest Hessian eigenvalue", color=plots.COLORS[1])
    along.margins(y=0.1)
    along.set_ylim(bottom=0)
    loss = along.twinx()
    loss.plot(line["point"], line["loss"], "s:", color=plots.COLORS[0])
    loss.set_ylabel("cross-entropy [nats]", color=plots.COLORS[0])
    loss.grid(visible=False)
    along.set_xlabel("position on the line")
    plots.letter(along, "A", f"branches of epoch k = {line['k'][0]}")
    for name, ax, start in zip(ascii_uppercase[1:], tracks, starts, strict=False):
        rows, band = table.where(start=start), bands.where(start=start)
        curves(ax, rows, band, "batch_size", lambda b: f"B = {b}", "step", displaced=True)
        plots.letter(ax, name, f"from s = {start:g} (lr = {table['lr'][0]:g})")
    return figure
