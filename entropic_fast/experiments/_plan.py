"""What a run will take before it is begun: its tasks on so many processes, simulated."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch.nn.functional import cross_entropy

from .._utils.devices import is_gpu
from .._utils.system_info import available_cores, peak_memory
from .._utils.table import Table
from ..curvature.estimators._block_lanczos import EXTRA_COLUMNS
from ..objective import norm_layers
from . import _inputs as pieces
from ._costs import count_operations
from ._executor import Task
from ._pipeline import tasks_until
from ._run_folder import RunFolder

ROUNDS, SECONDS = 10, 1.0  # at least so many timed steps, and so long
# Seconds that a stage takes for each of its tasks' cost, in gradients of training, as in recorded
# runs: of networks without batch normalization (`demo`) and with it (`small`). Both processes were
# at work there, while the gradient is timed alone: training itself took 1.1 times as long.
PRICES = {
    "train": (1.1, 1.1), "path": (0.56, 1.39), "curvature": (0.27, 0.54), "spectrum": (0.63, 0.23),
    "relax": (0.44, 0.88), "force": (1.0, 0.9), "lmc": (0.55, 0.74), "fig6": (0.58, 0.75),
    "fig7": (0.7, 1.18), "straight-line": (0.42, 0.88), "bad-minimum": (0.47, 0.93),
}  # fmt: skip
LANGEVIN = 2e-5  # seconds for a cost of 1 of the Langevin simulations, whatever the network


def in_seconds(run: RunFolder, tasks: Sequence[Task], gradient: float) -> list[Task]:
    """Tasks with the seconds that they are expected to take as costs."""
    batched = any(m.track_running_stats for m in norm_layers(pieces.network(run)))

    def price(stage: str) -> float:
        if stage == "langevin":
            return LANGEVIN
        return PRICES[stage][batched] * gradient

    return [replace(task, cost=task.cost * price(task.name.split("/")[0])) for task in tasks]


def gradient_cost(run: RunFolder) -> tuple[float, float]:
    """Seconds and operations of an example's gradient in a step of training, on one thread."""
    training, _ = pieces.images(run)
    x, y = training.tensors(min(run.config.train.batch_size, len(training)))
    model = pieces.network(run).to(memory_format=torch.channels_last)
    x = x.to(run.device, memory_format=torch.channels_last)
    y = y.to(run.device)

    def step() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        if is_gpu(run.device):
            torch.cuda.synchronize()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: list[float] = []
    try:
        while len(taken) < ROUNDS or sum(taken) < SECONDS:
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    seconds = statistics.median(taken[len(taken) // 2 :])  # the first ones are slower
    return seconds / len(x), count_operations(step) / len(x)


def vectors(run: RunFolder, stage: str) -> int:
    """Bytes of the vectors and matrices that a task of a stage holds at once, besides all else.

    In numbers of P: training has gradients and momentum; a path its pivots, their gradients,
    velocities and copies; curvature a basis; replicas points, gradients and momentum.
    """
    config = run.config
    examples = config.curvature.spectrum_examples
    held = {
        "train": 3,
        "path": 6 * config.path.max_pivots,
        "curvature": EXTRA_COLUMNS + 2,
        "spectrum": 2,
        "relax": 4 * config.relax.replicas * max(len(config.relax.lrs), config.path.pivots),
        "force": 4 * config.force.replicas,
        "straight-line": 4 * config.straight_line.replicas,
        "bad-minimum": max(6 * config.path.max_pivots, 4 * config.bad_minimum.replicas),
        "langevin": 0,
    }.get(stage, 4)
    parameters = sum(p.numel() for p in pieces.network(run).parameters())
    # A Gram matrix, its copy, and the solver's own.
    return 4 * parameters * held + (3 * 8 * examples**2 if stage == "spectrum" else 0)


def makespan(tasks: Sequence[Task], processes: int) -> float:
    """Work until the last task ends, where each process takes the heaviest that is ready.

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
    rows = []
    for count in counts:
        needed = makespan(tasks, count)
        rows.append({"processes": count, "seconds": needed, "efficiency": work / (needed * count)})
    return Table.from_rows(rows)


def print_plan(console: Console, run: RunFolder, stage: str) -> None:
    """Tasks and time by stage, and the time on several numbers of processes of one thread each.

    Args:
        run: its configuration and images; what identifies these is written to its folder.
    """
    pieces.prepare(run)
    gradient, operations = gradient_cost(run)
    tasks = in_seconds(run, tasks_until(run, stage), gradient)
    base = peak_memory()
    stages: dict[str, list[float]] = {}
    for task in tasks:
        stages.setdefault(task.name.split("/")[0], []).append(task.cost)
    shown = RichTable("stage", "tasks", "core time", "longest task", "gradients", "memory")
    for name, times in stages.items():
        shown.add_row(
            *(name, str(len(times)), _minutes(sum(times)), _minutes(max(times))),
            f"{sum(times) / gradient:.2g}" if name != "langevin" else "",
            f"{(base + vectors(run, name)) / 2**20:,.0f} MiB",
        )
    console.print(shown)
    shown = RichTable("processes", "wall time", "efficiency", "machines like this")
    cores = available_cores()
    for row in plan(tasks).rows():
        seconds, share = float(row["seconds"]), float(row["efficiency"])  # type: ignore[arg-type]
        count = int(row["processes"])  # type: ignore[call-overload]
        machines = str(-(-count // cores))
        shown.add_row(str(count), _minutes(seconds), f"{100 * share:.0f} %", machines)
    console.print(shown)
    data, curvature = run.config.data, run.config.curvature
    parameters = sum(p.numel() for p in pieces.network(run).parameters())
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
