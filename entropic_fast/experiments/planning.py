"""What a run will take before it is begun: its units on so many processes, simulated."""

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

from ..normalisation import norm_layers
from ..table import Table
from . import pieces
from .run import RunFolder
from .schedule import Unit
from .stages import units_until

ROUNDS, SECONDS = 10, 1.0  # at least so many timed steps, and so long
# Seconds that a stage takes for each of its units' weight, in gradients of training, as in recorded
# runs: of networks without batch normalisation (`demo`) and with it (`small`). Both processes were
# at work there, while the gradient is timed alone: training itself took 1.1 times as long.
PRICES = {
    "train": (1.1, 1.1), "path": (0.56, 1.39), "curvature": (0.27, 0.54), "spectrum": (0.63, 0.23),
    "relax": (0.44, 0.88), "force": (1.0, 0.9), "lmc": (0.55, 0.74), "fig6": (0.58, 0.75),
    "fig7": (0.7, 1.18), "straight": (0.42, 0.88), "poor": (0.47, 0.93),
}  # fmt: skip
TOY = 2e-5  # seconds for a toy's weight of 1, whatever the network


def in_seconds(run: RunFolder, units: Sequence[Unit], gradient: float) -> list[Unit]:
    """Units with the seconds that they are expected to take as weights."""
    batched = any(m.track_running_stats for m in norm_layers(pieces.network(run)))

    def price(stage: str) -> float:
        if stage == "toy":
            return TOY
        return PRICES[stage][batched] * gradient

    return [replace(unit, weight=unit.weight * price(unit.name.split("/")[0])) for unit in units]


def seconds_per_gradient(run: RunFolder) -> float:
    """Seconds that one thread takes for an example's gradient in a step of training."""
    training, _ = pieces.images(run)
    x, y = training.tensors(min(run.config.train.batch_size, len(training)))
    model = pieces.network(run).to(memory_format=torch.channels_last)
    x = x.to(run.device, memory_format=torch.channels_last)
    y = y.to(run.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: list[float] = []
    try:
        while len(taken) < ROUNDS or sum(taken) < SECONDS:
            start = time.perf_counter()
            model.zero_grad()
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            if run.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(taken[len(taken) // 2 :]) / len(x)  # the first ones are slower


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


def plan(units: Sequence[Unit], counts: Sequence[int] = (1, 2, 4, 8, 16)) -> Table:
    """Wall-clock seconds of units, weighted in seconds, on several numbers of processes."""
    work = sum(unit.weight for unit in units)
    rows = []
    for count in counts:
        needed = makespan(units, count)
        rows.append({"processes": count, "seconds": needed, "efficiency": work / (needed * count)})
    return Table.from_rows(rows)


def print_plan(console: Console, run: RunFolder, stage: str) -> None:
    """Units and time by stage, and the time on several numbers of processes of one thread each.

    Args:
        run: its configuration and images; what identifies these is written to its folder.
    """
    pieces.prepare(run)
    gradient = seconds_per_gradient(run)
    units = in_seconds(run, units_until(run, stage), gradient)
    stages: dict[str, list[float]] = {}
    for unit in units:
        stages.setdefault(unit.name.split("/")[0], []).append(unit.weight)
    shown = RichTable("stage", "units", "core time", "longest unit")
    for name, times in stages.items():
        shown.add_row(name, str(len(times)), _minutes(sum(times)), _minutes(max(times)))
    console.print(shown)
    shown = RichTable("processes", "wall time", "efficiency")
    for row in plan(units).rows():
        seconds, share = float(row["seconds"]), float(row["efficiency"])  # type: ignore[arg-type]
        shown.add_row(str(row["processes"]), _minutes(seconds), f"{100 * share:.0f} %")
    console.print(shown)
    console.print(
        f"from {1e3 * gradient:.2g} ms for an example's gradient here, on one thread, and what "
        "stages of the recorded runs of `demo` and `small` took in such gradients on two cores; "
        "other networks and busy machines may take twice as long",
        soft_wrap=True,
    )


def _minutes(seconds: float) -> str:
    """Minutes and seconds, or from an hour on hours and minutes.

    >>> _minutes(75.2), _minutes(7384.0)
    ('1:15', '2 h 03 min')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
