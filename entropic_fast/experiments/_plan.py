"""The expected time and memory of a run: its tasks scheduled on several numbers of processes."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch.nn.functional import cross_entropy

from .._utils.system_info import available_cores, peak_memory
from .._utils.table import Table
from ..objective import norm_layers
from . import _inputs
from ._costs import count_operations, timings
from ._executor import Task, limited_threads
from ._pipeline import STAGES, tasks_until
from ._run_folder import RunFolder
from .figures.fig2 import Curvature

ROUNDS, SECONDS = 10, 1.0  # at least so many timed steps, and so long
# Factors are from recorded runs of `demo` (no batch normalization) and `small`. Two processes
# shared the machine there, while the gradient is timed alone: training took 1.1 times as long.
EXPECTED = {name: e for stage in STAGES.values() for name, e in stage.expected.items()}


def in_seconds(run: RunFolder, tasks: Sequence[Task], gradient: float) -> list[Task]:
    """Tasks whose costs are the seconds that they are expected to take."""
    batched = any(m.track_running_stats for m in norm_layers(_inputs.network(run)))

    def seconds(task: Task) -> float:
        expected = EXPECTED[task.name.split("/")[0]]
        return task.cost * (expected.gradients[batched] * gradient or expected.seconds)

    return [replace(task, cost=seconds(task)) for task in tasks]


def gradient_cost(run: RunFolder) -> tuple[float, float]:
    """Seconds and operations of an example's gradient in a step of training, on one thread."""
    training, _ = _inputs.images(run)
    x, y = training.tensors(min(run.config.train.batch_size, len(training)))
    model = _inputs.network(run).to(memory_format=torch.channels_last)
    x = x.to(run.device, memory_format=torch.channels_last)
    y = y.to(run.device)

    def step() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

    with limited_threads(1):
        taken = timings(step, ROUNDS, SECONDS)
    seconds = statistics.median(taken[len(taken) // 2 :])  # the first ones are slower
    return seconds / len(x), count_operations(step) / len(x)


def held(run: RunFolder, name: str) -> int:
    """Bytes of the vectors and matrices that a task of a stage holds at once."""
    parameters = sum(p.numel() for p in _inputs.network(run).parameters())
    expected = EXPECTED[name]
    return 4 * parameters * expected.vectors(run.config) + expected.matrices(run.config)


def makespan(tasks: Sequence[Task], processes: int) -> float:
    """Time until the last task ends, if each process takes the most expensive ready task.

    >>> a, b = Task("a", print, cost=3.0), Task("b", print, cost=2.0)
    >>> c = Task("c", print, needs=("a",), cost=2.0)
    >>> [makespan([a, b, c], n) for n in (1, 2, 3)]
    [7.0, 5.0, 5.0]
    """
    todo = {task.name: task for task in tasks}
    unfinished, now = set(todo), 0.0
    running: list[tuple[float, str]] = []
    while todo or running:
        ready = [u for u in todo.values() if not unfinished.intersection(u.needs)]
        while ready and len(running) < processes:
            task = max(ready, key=lambda u: u.cost)
            ready.remove(task)
            del todo[task.name]
            heapq.heappush(running, (now + task.cost, task.name))
        now, name = heapq.heappop(running)
        unfinished.discard(name)
    return now


def plan(tasks: Sequence[Task], counts: Sequence[int] = (1, 2, 4, 8, 16)) -> Table:
    """Wall-clock seconds of tasks, with costs in seconds, on several numbers of processes."""
    work = sum(task.cost for task in tasks)
    needed = {count: makespan(tasks, count) for count in counts}
    return Table.from_rows(
        [{"processes": n, "seconds": s, "efficiency": work / (s * n)} for n, s in needed.items()]
    )


def print_plan(console: Console, run: RunFolder, stage: str) -> None:
    """Print tasks and time by stage, and the time on several numbers of one-thread processes."""
    _inputs.prepare(run)
    gradient, operations = gradient_cost(run)
    tasks = in_seconds(run, tasks_until(run, stage), gradient)
    base = peak_memory()
    stages: dict[str, list[float]] = {}
    for task in tasks:
        stages.setdefault(task.name.split("/")[0], []).append(task.cost)
    shown = RichTable("stage", "tasks", "core time", "longest task", "gradients", "memory")
    for name, times in stages.items():
        shown.add_row(
            name,
            str(len(times)),
            _minutes(sum(times)),
            _minutes(max(times)),
            f"{sum(times) / gradient:.2g}" if name != "langevin" else "",
            f"{(base + held(run, name)) / 2**20:,.0f} MiB",
        )
    console.print(shown)
    shown = RichTable("processes", "wall time", "efficiency", "machines like this")
    cores = available_cores()
    for row in plan(tasks).rows():
        count, share = row["processes"], f"{100 * row['efficiency']:.0f} %"
        shown.add_row(str(count), _minutes(row["seconds"]), share, str(-(-count // cores)))
    console.print(shown)
    data, curvature = run.config.data, run.config[Curvature]
    parameters = sum(p.numel() for p in _inputs.network(run).parameters())
    console.print(
        f"P = {parameters:,}; curvature of E = {data.curvature_examples:,} examples with "
        f"{curvature.probes} probes. Times are from {1e3 * gradient:.2g} ms for an example's "
        f"gradient here, on one thread ({operations:.2g} floating-point operations), and what "
        "stages of the recorded runs of `demo` and `small` took in such gradients on two cores; "
        "other networks and busy machines may take twice as long. Memory is of one process: its "
        "peak so far and the vectors of a stage; curvature takes up to a quarter of what is free "
        "besides. Processes send one another nothing: they meet in the run's folder",
        soft_wrap=True,
        highlight=False,
    )


def _minutes(seconds: float) -> str:
    """Minutes and seconds, or from an hour on hours and minutes.

    >>> _minutes(75.2), _minutes(7384.0)
    ('1:15', '2 h 03 min')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
