"""Figure 5: entropic barriers appear later in training (linear mode connectivity).

Figures 6 and 7 are the same for other networks and images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..._utils.convergence import held
from ..._utils.table import Table
from ...training._train import Trained
from ...training.lmc import Trunk, branch, measure_line, summarize
from .. import _inputs as pieces
from .._executor import Progress, Task
from .._run_folder import RunFolder
from .._sections import LMCSection
from . import _style as plots


def tasks(run: RunFolder, section: str = "lmc") -> list[Task]:
    """One trunk a seed, and one task for every epoch k at which it branches."""
    lmc = _section(run, section)
    epochs = lmc.epochs or run.config.train.epochs
    examples = pieces.training_examples(run)
    found = []
    for seed in lmc.seeds:
        trunk = f"{section}/s{seed}-trunk"
        longest = max(lmc.branch_epochs) * examples
        found.append(Task(trunk, train_trunk, (section, seed), cost=longest))
        for k in lmc.branch_epochs:
            cost = 2.0 * (epochs - k) * examples + pieces.curvature_work(run, 10 * lmc.points)
            name = f"{section}/s{seed}-k{k}"
            found.append(Task(name, measure, (section, seed, k), (trunk,), cost))
    return found


def _section(run: RunFolder, section: str) -> LMCSection:
    found: LMCSection = getattr(run.config, section)
    return found


def train_trunk(run: RunFolder, progress: Progress, section: str, seed: int) -> dict[str, Any]:
    """Train to the last branching epoch and keep the network and momentum at each."""
    lmc = _section(run, section)
    training, _ = pieces.images(run, lmc.data)
    config = pieces.recipe(run, lmc.epochs, lmc.batch_size)
    last = max(lmc.branch_epochs)
    trunk = Trunk(
        lambda: pieces.network(run, lmc.model, lmc.data),
        training,
        config,
        seed,
        lambda _, done, __: progress(done / max(1, last)),
    )
    return {f"k{k}": _pack(trunk.at(k)) for k in sorted(lmc.branch_epochs)}


def measure(run: RunFolder, progress: Progress, section: str, seed: int, k: int) -> dict[str, Any]:
    """Finish two branches and measure the line between them; figure 8's ends are kept."""
    lmc = _section(run, section)
    training, test = pieces.images(run, lmc.data)
    config = pieces.recipe(run, lmc.epochs, lmc.batch_size)
    network = pieces.network(run, lmc.model, lmc.data)
    start = _unpack(run.tensors(f"{section}/s{seed}-trunk", f"k{k}"), network, k)
    share = {"branch 1": (0.0, 0.4), "branch 2": (0.4, 0.4), "line": (0.8, 0.2)}

    def advance(what: str, done: int, total: int) -> None:
        first, part = share[what]
        progress(first + part * done / total)

    a, b = (
        branch(start, training, config, number, seed=seed, progress=advance) for number in (1, 2)
    )
    with held():  # the table says what is not converged
        line = measure_line(
            a,
            b,
            training,
            eval_data=test,
            points=lmc.points,
            curvature_examples=run.config.data.curvature_examples or None,
            tol=run.config.curvature.tol,
            seed=seed,
            progress=advance,
        )
    rows = line.num_rows
    found: dict[str, Any] = {
        "line": Table({"seed": [seed] * rows, "k": [k] * rows, **line}),
    }
    if (section, k) == ("lmc", pieces.straight_line_epoch(run)):  # figure 8's
        found["branch1"], found["branch2"] = dict(a.state_dict()), dict(b.state_dict())
    return found


def collect(run: RunFolder, section: str = "lmc", name: str = "fig5") -> dict[str, Table]:
    """The numbers behind the figure: the lines, and the instability for each seed and k."""
    lmc = _section(run, section)
    lines, summaries = [], []
    for seed in lmc.seeds:
        tables = [run.table(f"{section}/s{seed}-k{k}", "line") for k in lmc.branch_epochs]
        rows = [row for table in tables for row in table.rows()]
        lines += rows
        summaries += [{"seed": seed, **row} for row in summarize(Table.from_rows(rows)).rows()]
    return {
        f"{name}_lines": Table.from_rows(lines),
        f"{name}_instability": Table.from_rows(summaries),
    }


def other(
    section: str,
) -> tuple[Callable[[RunFolder], dict[str, Table]], Callable[[dict[str, Table]], Figure]]:
    """`collect` and `draw` of another section's figure, which has the section's name."""
    return partial(collect, section=section, name=section), partial(draw, name=section)


def draw(tables: dict[str, Table], name: str = "fig5") -> Figure:
    """Panels A to D of the paper's figure 5."""
    lines, instability = tables[f"{name}_lines"], tables[f"{name}_instability"]
    figure, axes = plots.mosaic(["ACD", "BcD"], width=3.9, height=2.7)
    schematic, mean, loss, eigenvalue, unstable = (axes[name] for name in "ABCcD")
    _draw_schematic(schematic)
    k_values = sorted(set(lines["k"].tolist()))
    seeds = sorted(set(lines["seed"].tolist()))

    averages = np.array(
        [[lines.where(seed=s, k=k)["loss"].mean() for k in k_values] for s in seeds]
    )
    plots.mean_and_points(mean, np.array(k_values), averages, plots.COLORS[0])
    mean.set_ylabel("mean loss on the line [nats]")
    plots.letter(mean, "B", "loss on the line")

    shades = plots.shades(len(k_values))
    for column, ax in (("loss", loss), ("eigenvalue", eigenvalue)):
        for shade, k in zip(shades, k_values, strict=True):
            x = lines.where(seed=seeds[0], k=k)["point"]
            y = np.mean([lines.where(seed=s, k=k)[column] for s in seeds], axis=0)
            ax.plot(x, y, "o-", color=shade, label=f"k = {k}")
            if column == "eigenvalue" and "converged" in lines.columns:
                met = [lines.where(seed=s, k=k)["converged"] for s in seeds]
                means = Table({"x": x, "y": y, "met": np.min(met, axis=0)})
                plots.mark_unconverged(ax, means, "x", "y", "met")
        ax.set_xlabel("position on the line")
        plots.log_if_wide(ax, lines[column])
    loss.legend()
    loss.set_ylabel("loss [nats]")
    eigenvalue.set_ylabel("largest Hessian eigenvalue")
    plots.letter(loss, "C", "loss along the line")
    plots.letter(eigenvalue, "C", "curvature along the line")

    for column, color, label in (
        ("loss_instability", plots.COLORS[0], "loss"),
        ("eigenvalue_instability", plots.COLORS[1], "largest eigenvalue"),
    ):
        values = np.array([instability.where(seed=s)[column] for s in seeds])
        plots.mean_and_points(unstable, np.array(k_values), values, color, label)
    if max(float(instability[f"{name}_instability"].max()) for name in ("loss", "eigenvalue")) > 1:
        unstable.set_yscale("symlog", linthresh=0.1)
    unstable.set_ylabel("instability (relative rise)")
    unstable.legend()
    plots.letter(unstable, "D", "instability")
    for ax in (mean, unstable):
        ax.set_xlabel("branching epoch k")
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks(k_values, [str(k) for k in k_values])
    return figure


def _draw_schematic(ax: Axes) -> None:
    ax.axis("off")
    ax.set_xlim(-0.05, 1.05)
    ax.set_ylim(-0.05, 1.05)
    for start, end, bend in (
        ((0.0, 0.5), (0.45, 0.5), 0.0),
        ((0.45, 0.5), (0.95, 0.9), -0.25),
        ((0.45, 0.5), (0.95, 0.1), 0.25),
    ):
        ax.annotate(
            "",
            end,
            start,
            arrowprops={
                "arrowstyle": "-|>",
                "lw": 1.5,
                "color": "#444444",
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    ax.plot([0.95, 0.95], [0.87, 0.13], "--", color=plots.COLORS[1], lw=1.5)
    for x, y, text, side in (
        (0.0, 0.56, "start", "left"),
        (0.37, 0.38, "epoch k", "center"),
        (0.6, 0.93, "data order 1", "center"),
        (0.6, 0.04, "data order 2", "center"),
        (0.91, 0.5, "straight line", "right"),
    ):
        ax.text(x, y, text, ha=side, fontsize=8)
    plots.letter(ax, "A", "branch, then connect")


def _pack(state: Trained) -> dict[str, Tensor]:
    named = [
        *((f"parameter:{n}", p) for n, p in state.model.named_parameters()),
        *((f"buffer:{n}", b) for n, b in state.model.named_buffers()),
        *((f"momentum:{n}", m) for n, m in state.optimizer_state.items()),
    ]
    return {name: value.detach().clone() for name, value in named}


def _unpack(tensors: dict[str, Tensor], model: nn.Module, epoch: int) -> Trained:
    kinds: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "momentum": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(":")
        kinds[kind][rest] = value
    model.load_state_dict({**kinds["parameter"], **kinds["buffer"]})
    return Trained(model, epoch, kinds["momentum"], Table({}))
