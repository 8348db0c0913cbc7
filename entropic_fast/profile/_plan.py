"""The expected cost of a model's profile on several numbers of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from .._utils.system_info import available_cores
from ..curvature.estimators import EXTRA_COLUMNS
from ..experiments import limited_threads
from ..experiments._costs import Cost, Machine, Work, measure, path_work, relaxation_work, work_of
from ._subject import Subject
from ._tasks import BAND, CYCLES, PROFILE, STARTS

SEARCHES = 80  # products for the eigenvalues at a point ...
TRACKED = 10  # ... and at a point of a path, from its neighbor's vector
QUICK_TRACE = 8  # gradients for the deflated share of a trace
# Between processes of one machine, if there is only one: bytes per second, seconds per message.
ASSUMED_BANDWIDTH, ASSUMED_LATENCY = 1e9, 5e-5


def works(subject: Subject, processes: int = 1) -> dict[str, Work]:
    """The work of each process, by the name of the task."""
    s, subset, full = subject.settings, subject.subset, subject.full
    parameters, itemsize = full.num_params, torch.finfo(full.dtype).bits // 8
    shape: dict[str, Any] = {
        "parameters": parameters, "processes": processes, "itemsize": itemsize
    }  # fmt: skip

    def of(quantity: str, columns: int = 1) -> Work:
        return work_of(quantity, examples=subset.num_examples, columns=columns, **shape)

    vector = itemsize * parameters
    trace = [of("forms", columns=s.probes), of("norms").times(QUICK_TRACE), of("loss")]
    spectra = [
        *trace,
        of("products", columns=s.density_probes).times(s.density_steps),
        of("products").times(SEARCHES),
        *([] if subject.no_scores else [of("norms"), of("gram")]),
        _held(processes, vector * s.density_probes * (s.density_steps + 2)),
        _held(processes, vector * (s.eigenvalues + EXTRA_COLUMNS)),
    ]
    found = {f"spectra/{name}": _sum(spectra) for name in subject.places}
    if subject.end is None:
        return found
    neb = subject.neb
    batch = neb.batch_size or full.num_examples
    updates = path_work(pivots=neb.max_pivots, batch_size=batch, steps=s.path_steps, **shape)
    points = (neb.pivots * (neb.eval_points + 1) * 4 + 33) * (1 + full.has_running_statistics)
    dense = work_of("loss", examples=full.num_examples, **shape).times(points)
    along = [*trace, of("norms"), of("products").times(TRACKED)]
    relaxation = relaxation_work(
        replicas=len(STARTS) * s.replicas, batch_size=subject.batch_size, steps=s.steps, **shape
    )
    return {
        BAND: updates + dense,
        PROFILE: _sum(along).times(s.points) + _held(processes, vector * (1 + EXTRA_COLUMNS)),
        **dict.fromkeys(CYCLES, relaxation),
        **found,
    }


def total(subject: Subject, machine: Machine, processes: int) -> Cost:
    """All tasks of a profile, one after another."""
    return _sum(list(works(subject, processes).values())).on(machine)


def print_plan(console: Console, subject: Subject) -> None:
    """Print what the profile takes on several numbers of processes, from measured speeds.

    Under `torchrun` the speeds are those of its ranks. Otherwise they are those of this process,
    with all threads and with one, and the speed of messages is assumed.
    """
    communicator, objective = subject.subset.communicator, subject.subset
    found = {}
    if communicator.size > 1:
        found[communicator.size] = measure(objective)
        note = (
            f"speeds of {communicator.size} processes that share the work here, messages measured"
        )
    else:
        found[1] = measure(objective)
        with limited_threads(1):
            one = measure(objective)
        one = replace(one, bandwidth=ASSUMED_BANDWIDTH, latency=ASSUMED_LATENCY)
        found |= dict.fromkeys((2, 4, 8, 16, 64), one)
        note = (
            f"one process with {torch.get_num_threads()} threads, several with one each "
            f"({available_cores()} cores here; more processes need more machines), messages "
            f"assumed at {ASSUMED_BANDWIDTH:.0g} bytes a second and "
            f"{1e6 * ASSUMED_LATENCY:.0f} microseconds"
        )
    shown = RichTable(
        "processes", "time", "gradients", "operations", "bytes sent", "messages", "memory"
    )
    for processes, machine in found.items():
        cost = total(subject, machine, processes)
        shown.add_row(str(processes), *_cells(cost))
    console.print(shown)
    s = subject.settings
    console.print(
        f"of each process, with E = {subject.subset.num_examples:,} examples, P = "
        f"{subject.full.num_params:,}, {s.probes} probes; {note}. Memory is that of vectors and "
        "matrices, besides the model, the data and, for activations, up to a quarter of what is "
        "free. Times were 0.5 to 1.3 times those taken on an idle machine; a busy one is slower.",
        soft_wrap=True,
        highlight=False,
    )


def _cells(cost: Cost) -> list[str]:
    numbers = (cost.gradients, cost.operations, cost.sent, float(cost.messages))
    seconds = cost.seconds
    time = f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    if seconds >= 6000:
        time = f"{seconds / 3600:.1f} h"
    return [time, *(f"{n:.2g}" for n in numbers), f"{cost.memory / 2**20:,.0f} MiB"]


def _held(processes: int, memory: float) -> Work:
    return Work("vectors", processes, memory=memory)


def _sum(parts: Sequence[Work]) -> Work:
    return reduce(lambda a, b: a + b, parts)
