"""The whole run: every task in order, then figures, claims and report from their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from rich.console import Console

from .._utils import atomic_io as store
from .._utils import checks
from .._utils.devices import GPU_TYPES, is_gpu
from .._utils.table import Table
from ..ops.backend import backend_for
from . import _inputs as pieces
from . import _plotly as interactive
from . import _report as report
from . import claims as claim_tests
from ._energy import Energy
from ._executor import Task, execute
from ._run_folder import RunFolder
from ._sections import Config
from .figures import _relaxation_runs as relaxation
from .figures import _style as plots
from .figures import fig1, fig2, fig3, fig4, fig5, fig8, fig9
from .figures import force as fig_force

Collect = Callable[[RunFolder], dict[str, Table]]
Draw = Callable[[dict[str, Table]], Figure]


def _lmc_tasks(run: RunFolder) -> list[Task]:
    """Those of figures 5, 6 and 7."""
    return [task for section in ("lmc", "fig6", "fig7") for task in fig5.tasks(run, section)]


# Tasks of each stage, and the stages each one needs.
_STAGES: dict[str, tuple[Callable[[RunFolder], list[Task]], tuple[str, ...]]] = {
    "langevin": (fig1.tasks, ()),
    "train": (pieces.train_tasks, ()),
    "path": (fig2.path_tasks, ("train",)),
    "curvature": (fig2.curvature_tasks, ("train", "path")),
    "relax": (relaxation.tasks, ("train", "path")),
    "force": (fig_force.tasks, ("train", "path")),
    "lmc": (_lmc_tasks, ()),
    "straight-line": (fig8.tasks, ("lmc",)),
    "bad-minimum": (fig9.tasks, ("train",)),
    "report": (
        lambda run: [],
        (
            "langevin",
            "train",
            "path",
            "curvature",
            "relax",
            "force",
            "lmc",
            "straight-line",
            "bad-minimum",
        ),
    ),
}


@dataclass(frozen=True)
class _Entry:
    collect: Collect
    draw: Draw
    title: str
    caption: str | Callable[[Config], str]
    shown: Callable[[Config], bool] = lambda config: True


def _other_network(section: str) -> Callable[[Config], str]:
    def caption(config: Config) -> str:
        other = getattr(config, section)
        return f"As figure 5, for {other.model} on {other.data or config.data.name}."

    return caption


_FIGURES = {
    "fig1": _Entry(
        fig1.collect,
        fig1.draw,
        "Figure 1. Curvature produces an entropic force.",
        "A: particles in a ring potential whose stiffness varies with angle; uniform without "
        "noise, gathered where the ring is flat with it. B: a particle on a ridge (of all, the "
        "one that ends nearest to the mean), and the mean of all, which drifts to the broad side. "
        "Effective potential (T/2) ln det H across the slow direction [D].",
    ),
    "fig2": _Entry(
        fig2.collect,
        fig2.draw,
        "Figure 2. Entropy induces barriers between minima.",
        "Hessian trace (A), its largest eigenvalue (B) and the loss (C) along minimum energy "
        "paths; colors are pairs of minima, markers AutoNEB seeds, each marker a pivot. "
        "D: spectrum of the score matrix along the first path. Normalization statistics, where "
        "a network keeps them, are re-estimated at every point.",
    ),
    "fig3": _Entry(
        fig3.collect,
        fig3.draw,
        "Figure 3. Relaxation by entropic forces.",
        "Projected SGD on the first path; thin lines are replicas, thick ones their means "
        "with 95 % intervals (Student's t) as bands. "
        "Replicas see the same minibatches at every setting. D (ours): by the number k of updates "
        "between projections.",
    ),
    "fig4": _Entry(
        fig4.collect,
        fig4.draw,
        "Figure 4. Relaxation under different optimizers.",
        "The same start and batch size for vanilla SGD, Nesterov momentum 0.9 and Adam.",
    ),
    "fig5": _Entry(
        fig5.collect,
        fig5.draw,
        "Figure 5. Entropic barriers matter later in training.",
        "Two branches from epoch k with different data orders, joined by a straight line. "
        "Instability: (highest on the line - mean of the ends) / mean of the ends [D]. "
        "Points are trunks; bands, from three trunks on, 95 % intervals of the mean (Student's t).",
    ),
    "fig6": _Entry(
        *fig5.other("fig6"),
        "Figure 6 (ours). Figure 5 for another network.",
        _other_network("fig6"),
        lambda config: bool(config.fig6.seeds),
    ),
    "fig7": _Entry(
        *fig5.other("fig7"),
        "Figure 7 (ours). Figure 5 for a third network.",
        _other_network("fig7"),
        lambda config: bool(config.fig7.seeds),
    ),
    "fig8": _Entry(
        fig8.collect,
        fig8.draw,
        "Figure 8 (ours). Relaxation between linearly connected networks.",
        "A: curvature and loss on the straight line between two branches of the first trunk. "
        "Then projected SGD on that line, from each start: displacement along it, means over "
        "replicas with 95 % intervals.",
        lambda config: bool(config.straight_line.batch_sizes),
    ),
    "fig9": _Entry(
        fig9.collect,
        fig9.draw,
        "Figure 9 (ours). A minimum that generalizes badly.",
        "Path from the first minimum (0) to one that fits the same images and wrong labels on "
        "others (1); loss, curvature and dynamics are those on the images with right labels.",
        lambda config: config.bad_minimum.corrupted_labels > 0,
    ),
    "force": _Entry(
        fig_force.collect,
        fig_force.draw,
        "The force, measured.",
        "Bursts of projected SGD from positions along the first path, at a temperature low enough "
        "for theory. A: drift velocity, less that of the same burst without noise and less what "
        "the exclusion of an epoch's minibatches makes, against the entropic velocity predicted "
        "from curvature across the path and gradient noise; bars are 95 % over replicas, and over "
        "the predictions' samples, which the line and its band take for exact. B: velocities along "
        "the path, with what the mean over one order of batches leaves uncertain. C: slopes on "
        "that prediction of the drift at every k (below the largest with a third of the updates "
        "and a quarter of the replicas), and of what a burst without noise does beyond the "
        "gradient. D: shares of the measured drift that its parts and the controls explain, with "
        "95 % percentile intervals [D].",
    ),
}


def choose_device(name: str) -> str:
    """ "cpu" or "cuda", from "auto" too.

    Raises:
        ValueError: another name, or "cuda" where torch finds no GPU.
    """
    checks.one_of("--device", name, ("auto", "cpu", *sorted(GPU_TYPES)))
    if name != "auto" and is_gpu(name) and not torch.cuda.is_available():
        raise checks.invalid("--device", "a GPU that torch can use", "none", "pass --device cpu")
    found = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if is_gpu(found):  # of torchrun's processes on a machine each takes a GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return found


def all_tasks(run: RunFolder) -> list[Task]:
    """Every task of a run, stage by stage."""
    return [task for tasks, _ in _STAGES.values() for task in tasks(run)]


def tasks_until(run: RunFolder, stage: str) -> list[Task]:
    """Every task of a stage and of the stages it needs."""
    names = [name for name in _STAGES if name in (*_STAGES[stage][1], stage)]
    return [task for name in names for task in _STAGES[name][0](run)]


def execute_until(run: RunFolder, stage: str, workers: int | None, console: Console) -> None:
    """Compute every task of a stage and of the stages it needs that is not finished yet."""
    if stage in ("relax", "force", "report"):
        backend_for(
            "projected_step", run.device
        )  # a forced backend that cannot run is an error now
    if stage != "langevin":
        pieces.prepare(run)
    tasks = tasks_until(run, stage)
    before = run.finished_tasks()
    if not before:
        c = run.config
        text = f"preset {c.preset}: {c.model.name} on {c.data.name}, {len(tasks)} tasks"
        console.print(f"{text}, into {run.path}", markup=False, highlight=False, soft_wrap=True)
    with Energy(run.device) as energy:
        execute(run, tasks, workers=workers, console=console)
    if run.finished_tasks() > before:
        command = "reproduce" if stage == "report" else stage
        run.add_energy(command, energy.seconds, energy.joules)


def write_report(run: RunFolder, console: Console) -> None:
    """Figures, tables, claims and report of a finished run; prints the claims.

    Raises:
        ValueError: tasks are missing; says which and how to compute them.
    """
    missing = [task.name for task in all_tasks(run) if not run.is_intact(task.name)]
    if missing:
        raise checks.invalid(
            "RUN",
            "a finished run",
            f"one with {len(missing)} tasks missing or damaged, as {missing[0]}",
            "run `entropic-fast reproduce` with the same --out, preset and overrides",
        )
    entries = []
    for name, entry in _FIGURES.items():
        if not entry.shown(run.config):
            continue
        tables = entry.collect(run)
        for table_name, table in tables.items():
            table.to_csv(run.path / "data" / f"{table_name}.csv")
        with plots.look():
            figure = entry.draw(tables)
            plots.save(figure, run.path / "figures", name)
            charts = interactive.charts(figure)
        caption = entry.caption if isinstance(entry.caption, str) else entry.caption(run.config)
        entries.append(report.FigureEntry(name, entry.title, caption, tuple(tables), tuple(charts)))
    minima = pieces.summary(run)
    minima.to_csv(run.path / "data" / "minima.csv")
    claims = claim_tests.evaluate(run.path / "data")
    store.write_json(run.path / "claims.json", claim_tests.to_json(claims))
    notes = [
        f"Relaxation of figures 3A and 3B: {relaxation.choice_text(run)}. Figure 4: learning "
        f"rate {relaxation.optimizer_rate(run):g}, Adam at "
        f"{run.config.relax.adam_lr_factor:g} times that; with momentum 0.9 a step is in effect "
        "ten times as large, and Adam's is of another kind altogether, so effective time, "
        "updates x lr, compares them only in the paper's sense.",
        "What no figure subtracts: the loss along a path is low but not flat, so part of every "
        "drift is descent. The displacement at the largest batch size bounds that part.",
        "A path is a choice: descended longer, or with smaller batches, it is flatter, because "
        "the noise of its own updates is an entropic force too. Between pivots the polyline cuts "
        "corners, and its loss is higher there (figure 2C).",
    ]
    times = [Table.from_csv(run.path / "data" / f"{name}_times.csv") for name in ("fig3", "fig4")]
    report.write(run, claims, entries, minima, times, notes)
    run.write_manifest()
    report.print_claims(console, claims)
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True)
