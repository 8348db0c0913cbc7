"""Figure 8 (ours): relaxation along the straight line between linearly connected networks."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing

from ..._utils.table import Table
from ...objective import Objective
from ...paths import linear_path
from .. import _inputs
from .._executor import Progress, Task
from .._figure import OURS, ClaimTest, Expected, Figure
from .._run_folder import RunFolder
from .._sections import StraightLine
from ..claims import Claim, verdict
from ..claims._intervals import floats, mean_interval, mean_text, pairs, unconverged_text
from . import _relaxation_runs as relaxation
from . import _style
from .fig3 import curves
from .fig5 import LMC, straight_line_epoch


def tasks(run: RunFolder) -> list[Task]:
    """One task for each batch size."""
    section = run.config[StraightLine]
    updates = len(section.starts) * section.replicas * section.steps
    return [
        Task(f"straight-line/B-{b}", relax_straight, (b,), (_ends(run),), float(updates * (b + 8)))
        for b in section.batch_sizes
    ]


def _ends(run: RunFolder) -> str:
    """The task whose branches are the line's ends."""
    return f"lmc/s{run.config[LMC].seeds[0]}-k{straight_line_epoch(run)}"


def relax_straight(run: RunFolder, progress: Progress, batch_size: int) -> dict[str, Any]:
    """Projected SGD on the line, from every start."""
    section, lmc = run.config[StraightLine], run.config[LMC]
    objectives: list[Objective] = []
    for branch in ("branch1", "branch2"):
        model = _inputs.network(run, lmc.model, lmc.data)
        model.load_state_dict(run.tensors(_ends(run), branch))
        objectives.append(_inputs.objective(run, model, _inputs.images(run, lmc.data)[0]))
    a, b = (obj.parameters_vector() for obj in objectives)
    path = linear_path(a, b)
    setup = relaxation.relaxation_setup(run, objectives[0], path, section.steps, section.replicas)
    settings = [(s, section.lr) for s in section.starts for _ in range(section.replicas)]
    task = f"straight-line/B-{batch_size}"
    return {"trajectory": relaxation.along(run, progress, task, "8", setup, settings, batch_size)}


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    sizes = run.config[StraightLine].batch_sizes
    table = relaxation.collect(run, [f"B-{b}" for b in sizes], stage="straight-line")
    return {
        "fig8_line": run.table(_ends(run), "line"),
        "fig8_relaxation": table,
        "fig8_bands": relaxation.bands(table),
    }


def draw(tables: dict[str, Table]) -> Drawing:
    """A: loss and largest eigenvalue on the line; then relaxation by batch size, for each start."""
    line, table, bands = (tables[f"fig8_{name}"] for name in ("line", "relaxation", "bands"))
    starts = table.group_by("start")
    figure, (along, *tracks) = _style.panels(1, 1 + len(starts), width=3.9, height=3.3)
    along.plot(line["point"], line["eigenvalue"], "o-", color=_style.COLORS[1])
    along.set_ylabel("largest Hessian eigenvalue", color=_style.COLORS[1])
    along.margins(y=0.1)
    along.set_ylim(bottom=0)
    loss = along.twinx()
    loss.plot(line["point"], line["loss"], "s:", color=_style.COLORS[0])
    loss.set_ylabel("cross-entropy [nats]", color=_style.COLORS[0])
    loss.grid(visible=False)
    along.set(xlabel="position on the line")
    _style.letter(along, "A", f"branches of epoch k = {line['k'][0]}")
    for name, ax, (start, rows) in zip(ascii_uppercase[1:], tracks, starts.items(), strict=False):
        band = bands.where(start=start)
        curves(ax, rows, band, "batch_size", lambda b: f"B = {b}", "step", displaced=True)
        _style.letter(ax, name, f"from s = {start:g} (lr = {table['lr'][0]:g})")
    return figure


def straight_line(line: Table, relaxation: Table) -> list[Claim]:
    """Figure 8: the drift between linearly connected networks."""
    groups = sorted(relaxation.group_by("batch_size").items())
    sizes, moved = [size for size, _ in groups], [_toward_the_ends(rows) for _, rows in groups]
    few, many, lost = pairs(moved[0], moved[-1])
    known = len(sizes) > 1 and len(few) > 1
    low, high = mean_interval(few - many) if known else (np.nan, np.nan)
    eigenvalue = floats(line["eigenvalue"])
    rise = eigenvalue[1:-1].max() / eigenvalue[[0, -1]].mean()
    return [
        Claim(
            "8",
            "noise drives to the ends of a straight line",
            "on the straight line between linearly connected networks, the drift toward the "
            "nearest end is the larger the smaller the batch",
            f"mean displacement toward the nearest end at B = {sizes[0]}, less that at "
            f"B = {sizes[-1]}, lr = {relaxation['lr'][0]:g}",
            float(few.mean() - many.mean()) if known else np.nan,
            low,
            high,
            verdict(low, high, 0.0),
            f"{mean_text(few)} and {mean_text(many)}, over {len(few)} replicas that share their "
            f"noise, of starts off the middle; {lost} diverged; the largest eigenvalue on the line "
            f"is at most {rise:.2f} of the ends' mean{unconverged_text(line, 'converged')}",
            OURS,
            {"replicas": len(set(relaxation["replica"].tolist()))},
        )
    ]


def _toward_the_ends(rows: Table) -> dict[int, float]:
    """Mean displacement toward the nearest end over a replica's starts; NaN if one diverged."""
    moved: dict[int, list[float]] = {}
    for _, track in sorted(rows.group_by("run").items()):
        position = floats(track["position"])
        if position[0] != 0.5:
            toward = (position[-1] - position[0]) * np.sign(position[0] - 0.5)
            moved.setdefault(int(track["replica"][0]), []).append(toward)
    return {replica: float(np.mean(values)) for replica, values in moved.items()}


FIGURE = Figure(
    name="fig8",
    command="straight-line",
    help="Relax along the line between two branches (figure 8).",
    section=StraightLine,
    needs=("lmc",),
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("fig8_line", "fig8_relaxation"), straight_line),),
    tiny={"steps": 30, "replicas": 2},
    minimum={"replicas": 3},
    title="Figure 8 (ours). Relaxation between linearly connected networks.",
    caption="A: curvature and loss on the straight line between two branches of the first trunk. "
    "The other panels: projected SGD on that line from each start, as displacement along the "
    "line; means over replicas with 95 % intervals.",
    source=OURS,
    enabled=lambda config: bool(config[StraightLine].batch_sizes),
    expected={
        "straight-line": Expected((0.42, 0.88), lambda config: 4 * config[StraightLine].replicas)
    },
)
