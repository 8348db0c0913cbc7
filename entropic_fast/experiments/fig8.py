"""Figure 8 (ours): relaxation along the straight line between linearly connected networks."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..objective import Objective
from ..paths import linear_path
from ..table import Table
from . import pieces, plots, relaxation
from .fig3 import curves
from .run import RunFolder
from .schedule import Report, Unit


def units(run: RunFolder) -> list[Unit]:
    """One unit for each batch size."""
    section = run.config.straight
    updates = len(section.starts) * section.replicas * section.steps
    return [
        Unit(f"straight/B-{b}", relax_straight, (b,), (_ends(run),), float(updates * (b + 8)))
        for b in section.batch_sizes
    ]


def _ends(run: RunFolder) -> str:
    """The unit whose branches are the line's ends."""
    return f"lmc/s{run.config.lmc.seeds[0]}-k{pieces.straight_epoch(run)}"


def relax_straight(run: RunFolder, report: Report, batch_size: int) -> dict[str, Any]:
    """Projected SGD on the line, from every start."""
    section, lmc = run.config.straight, run.config.lmc
    objectives: list[Objective] = []
    for branch in ("branch1", "branch2"):
        model = pieces.network(run, lmc.model, lmc.data)
        model.load_state_dict(run.tensors(_ends(run), branch))
        data = pieces.images(run, lmc.data)[0].tensors()
        objectives.append(Objective(model, "cross_entropy", data, device=run.device))
    a, b = (objective.parameters_vector() for objective in objectives)
    path = linear_path(a, b)
    course = relaxation.course_of(run, objectives[0], path, section.steps, section.replicas)
    settings = [(s, section.lr) for s in section.starts for _ in range(section.replicas)]
    unit = f"straight/B-{batch_size}"
    return {
        "trajectory": relaxation.along(run, report, unit, "8", course, settings, batch_size),
    }


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    sizes = run.config.straight.batch_sizes
    table = relaxation.collect(run, [f"B-{b}" for b in sizes], stage="straight")
    return {
        "fig8_line": run.table(_ends(run), "line"),
        "fig8_relaxation": table,
        "fig8_bands": relaxation.bands(table),
    }


def draw(tables: dict[str, Table]) -> Figure:
    """A: loss and largest eigenvalue on the line; B: relaxation by batch size."""
    line, table, bands = (tables[f"fig8_{name}"] for name in ("line", "relaxation", "bands"))
    figure, (along, tracks) = plots.panels(1, 2, width=4.4, height=3.3)
    along.plot(line["point"], line["eigenvalue"], "o-", color=plots.COLOURS[1])
    along.set_ylabel("largest Hessian eigenvalue", color=plots.COLOURS[1])
    along.set_ylim(bottom=0)
    loss = along.twinx()
    loss.plot(line["point"], line["loss"], "s:", color=plots.COLOURS[0])
    loss.set_ylabel("cross-entropy [nats]", color=plots.COLOURS[0])
    loss.grid(visible=False)
    along.set_xlabel("position on the line")
    plots.letter(along, "A", f"branches of epoch k = {line['k'][0]}")
    for number, start in enumerate(dict.fromkeys(table["start"].tolist())):
        curves(
            tracks,
            table.where(start=start),
            bands.where(start=start),
            "batch_size",
            lambda b, hidden=number > 0: f"_{b}" if hidden else f"B = {b}",  # type: ignore[misc]
            "step",
        )
    plots.letter(tracks, "B", f"relaxation (lr = {table['lr'][0]:g})")
    return figure
