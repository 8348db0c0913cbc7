"""The whole run: every task in order, then figures, claims and report from their files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from .._utils import atomic_io as store
from .._utils import checks
from .._utils.devices import GPU_TYPES, is_gpu
from .._utils.table import Table
from .._utils.terminal import say
from ..ops.backend import backend_for
from . import _inputs, _plotly
from . import _report as report
from . import claims as claim_tests
from ._executor import Task, execute
from ._figure import Stage, stages_of
from ._run_folder import RunFolder
from .figures import FIGURES, _style

REPORT = "report"


def _stages() -> dict[str, Stage]:
    found = {s.name: s for s in (*_inputs.STAGES, *stages_of(FIGURES.values()))}
    everything = Stage(REPORT, "", lambda run: [], tuple(found))
    return {**found, REPORT: everything}


# Every command that computes tasks; "report" needs all others.
STAGES = _stages()


def choose_device(name: str) -> str:
    """The device to use, "cpu" or "cuda"; "auto" is the GPU if there is one.

    Raises:
        ValueError: another name, or "cuda" where torch finds no GPU.
    """
    checks.one_of("--device", name, ("auto", "cpu", *sorted(GPU_TYPES)))
    if name != "auto" and is_gpu(name) and not torch.cuda.is_available():
        raise checks.invalid("--device", "a GPU that torch can use", "none", "pass --device cpu")
    found = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if is_gpu(found):  # the ranks that torchrun starts on a machine use its GPUs in turns
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return found


def all_tasks(run: RunFolder) -> list[Task]:
    """Every task of a run, stage by stage."""
    return tasks_until(run, REPORT)


def tasks_until(run: RunFolder, stage: str) -> list[Task]:
    """Every task of a stage and of the stages it needs."""
    needed = (*STAGES[stage].needs, stage)
    return [task for name in STAGES if name in needed for task in STAGES[name].tasks(run)]


def execute_until(run: RunFolder, stage: str, workers: int | None, console: Console) -> None:
    """Compute every task of a stage and of the stages it needs that is not finished yet."""
    if stage in ("relax", "force", "report"):
        backend_for("projected_step", run.device)  # fails if a forced backend cannot run
    if stage != "langevin":
        _inputs.prepare(run)
    tasks = tasks_until(run, stage)
    if not run.finished_tasks():
        c = run.config
        text = f"preset {c.preset}: {c.model.name} on {c.data.name}, {len(tasks)} tasks"
        say(console, f"{text}, into {run.path}")
    execute(run, tasks, workers=workers, console=console)


def evaluate_claims(data: Path) -> list[claim_tests.Claim]:
    """Every claim whose tables are in the folder `data`, in the order of the figures.

    Raises:
        ValueError: a file that is no table, or a table on which claims cannot be tested.
    """
    claims: list[claim_tests.Claim] = []
    for figure, test in ((f, test) for f in FIGURES.values() for test in f.claims):
        files = [data / f"{name}.csv" for name in test.tables]
        if not all(file.exists() for file in files):
            continue
        tables = [Table.from_csv(file) for file in files]
        try:
            claims += [c.at_scale(figure.minimum) for c in test.function(*tables)]
        except Exception as error:
            raise checks.invalid(
                " and ".join(map(str, files)),
                "the columns and numbers of a finished run in each",
                f"others in one ({type(error).__name__}: {error})",
                "`entropic-fast report RUN` writes them again",
            ) from error
    return claims


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
    data, entries = run.path / "data", []
    notes: list[str] = []
    for figure in FIGURES.values():
        if not figure.enabled(run.config):
            continue
        tables = figure.collect(run)
        for name, table in tables.items():
            table.to_csv(data / f"{name}.csv")
        with _style.look():
            drawing = figure.draw(tables)
            _style.save(drawing, run.path / "figures", figure.name)
            charts = tuple(_plotly.charts(drawing))
        caption = figure.caption_of(run.config)
        entries.append(
            report.FigureEntry(
                figure.name, figure.title, caption, tuple(tables), charts, figure.source
            )
        )
        notes += figure.notes(run)
    minima = _inputs.summary(run)
    minima.to_csv(data / "minima.csv")
    claims = evaluate_claims(data)
    store.write_json(run.path / "claims.json", claim_tests.to_json(claims))
    times = [Table.from_csv(data / f"{name}_times.csv") for name in ("fig3", "fig4")]
    report.write(run, claims, entries, minima, times, notes)
    run.write_manifest()
    report.print_claims(console, claims)
    say(console, f"report: {run.path / 'report.html'}")
