"""What a run will take before it is begun: its units on so many processes, simulated."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table as RichTable

from ..objective import Objective
from ..table import Table
from . import pieces
from .run import RunFolder
from .schedule import Unit
from .stages import units_until

BATCH, ROUNDS = 64, 5


def seconds_per_gradient(run: RunFolder) -> float:
    """Seconds that one thread takes for the gradient of one example, in batches of 64 at once."""
    training, _ = pieces.images(run)
    data = training.tensors(min(BATCH, len(training)))
    objective = Objective(pieces.network(run), "cross_entropy", data, device=run.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        objective.gradient()
        taken = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            objective.gradient()
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(taken) / objective.num_examples


def makespan(units: Sequence[Unit], processes: int) -> float:
    """Work until the last unit ends, where each process takes the heaviest that is ready.

    >>> a, b = Unit("a", print, weight=3.0), Unit("b", print, weight=2.0)
    >>> c = Unit("c", print, needs=("a",), weight=2.0)
    >>> [makespan([a, b, c], n) for n in (1, 2, 3)]
    [7.0, 5.0, 5.0]
    """
    todo = {unit.name: unit for unit in units}
    unfinished, now = set(todo), 0.0
    running: list[tuple[float, str]] = []
    while todo or running:
        ready = [u for u in todo.values() if not unfinished.intersection(u.needs)]
        while ready and len(running) < processes:
            unit = max(ready, key=lambda u: u.weight)
            ready.remove(unit)
            del todo[unit.name]
            heapq.heappush(running, (now + unit.weight, unit.name))
        now, name = heapq.heappop(running)
        unfinished.discard(name)
    return now


def plan(units: Sequence[Unit], seconds: float, counts: Sequence[int] = (1, 2, 4, 8, 16)) -> Table:
    """Expected wall-clock seconds of units on several numbers of processes of one thread each.

    Args:
        seconds: of `seconds_per_gradient`. A unit's weight counts such gradients.
    """
    work = sum(unit.weight for unit in units)
    rows = []
    for count in counts:
        needed = makespan(units, count)
        rows.append(
            {
                "processes": count,
                "seconds": needed * seconds,
                "efficiency": work / (needed * count),
            }
        )
    return Table.from_rows(rows)


def print_plan(console: Console, run: RunFolder, stage: str) -> None:
    """Units and work by stage, and the time on several numbers of processes.

    Args:
        run: its configuration and images; what identifies these is written to its folder.
    """
    pieces.prepare(run)
    seconds = seconds_per_gradient(run)
    stages: dict[str, list[float]] = {}
    units = units_until(run, stage)
    for unit in units:
        stages.setdefault(unit.name.split("/")[0], []).append(unit.weight)
    shown = RichTable("stage", "units", "core time", "longest unit")
    for stage, weights in stages.items():
        times = [_minutes(w * seconds) for w in (sum(weights), max(weights))]
        shown.add_row(stage, str(len(weights)), *times)
    console.print(shown)
    shown = RichTable("processes", "wall time", "efficiency")
    for row in plan(units, seconds).rows():
        time_, share = float(row["seconds"]), float(row["efficiency"])  # type: ignore[arg-type]
        shown.add_row(str(row["processes"]), _minutes(time_), f"{100 * share:.0f} %")
    console.print(shown)
    console.print(
        f"from {1e3 * seconds:.2g} ms for the gradient of an example here, on one thread; units "
        "are weighted by such gradients, which is right within a factor of two or so",
        soft_wrap=True,
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
