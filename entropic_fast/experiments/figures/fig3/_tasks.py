"""Tasks of figures 3 and 4: which replicas relax, at what settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

from ...._utils.table import Table
from ....dynamics import Trajectory, displacement
from ... import _inputs
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from .. import _relaxation_runs as relaxation
from .._relaxation_runs import Relax, RelaxationSetup, Settings
from . import _survival as survival

MINIMUM_DISPLACEMENT = 0.01  # of the path: below it nothing can be seen in a figure
SCAN = "relax/C"  # the learning-rate scan, from which the rule chooses


def tasks(run: RunFolder) -> list[Task]:
    """The scan over learning rates; at the rate chosen starts, batch sizes, k and optimizers."""
    section = run.config[Relax]
    path = f"path/{_inputs.path_names(run)[0][0]}"

    def work(settings: int, batch_size: int) -> float:
        # An update costs about as much as 8 more examples, whatever its batch.
        return float(settings * section.replicas * section.steps * (batch_size + 8))

    starts = len(section.starts) or (run.config.path.pivots - 1) // section.start_every
    base, after = section.batch_size, (path, SCAN)
    known = section.lr in (0.0, *section.lrs)
    sizes = {b: work(int(b != base or not known), b) for b in section.batch_sizes}
    known = section.optimizer_lr in section.lrs if section.optimizer_lr else known
    optimizers = {o: work(int(o != "sgd" or not known), base) for o in section.optimizers}
    cycles = {k: work(int(k != section.project_every), base) for k in section.cycles}
    return [
        Task(SCAN, scan_rates, (), (path,), work(len(section.lrs), base)),
        Task("relax/A", relax_starts, (), after, work(starts, base)),
        *(Task(f"relax/B-{b}", relax_batch, (b,), after, w) for b, w in sizes.items()),
        *(Task(f"relax/D-{k}", relax_cycle, (k,), after, w) for k, w in cycles.items()),
        *(Task(f"relax/{o}", relax_optimizer, (o,), after, w) for o, w in optimizers.items()),
    ]


def scan_rates(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Panel C: every learning rate at the base batch size; and the rate the rule chooses."""
    section = run.config[Relax]
    settings = _settings(run, [_start(run)], section.lrs)
    trajectory = relaxation.run_replicas(
        run, progress, SCAN, _first(run), settings, section.batch_size, "sgd"
    )
    table = relaxation.long_table(trajectory, "C", settings, section.replicas)
    return {"trajectory": table, "choice": _choose(trajectory, section.lr)}


def relax_starts(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Panel A: several starting points."""
    every = run.config[Relax].start_every
    starts = run.config[Relax].starts or _midpoints(run)[every - 1 :: every]
    return _panel(run, progress, "relax/A", "A", starts)


def relax_batch(run: RunFolder, progress: Progress, size: int) -> dict[str, Any]:
    """Panel B: one batch size."""
    return _panel(run, progress, f"relax/B-{size}", "B", batch_size=size)


def relax_cycle(run: RunFolder, progress: Progress, every: int) -> dict[str, Any]:
    """Panel D: one number k of updates between projections."""
    return _panel(run, progress, f"relax/D-{every}", "D", project_every=every)


def relax_optimizer(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Figure 4: one optimizer at the base batch size; Adam at its own multiple of the rate."""
    factor = run.config[Relax].adam_lr_factor if name == "adam" else 1.0
    rate = optimizer_rate(run) * factor
    return _panel(run, progress, f"relax/{name}", "4", rate=rate, optimizer=name)


def chosen_rate(run: RunFolder) -> float:
    """The learning rate of panels A and B."""
    return float(run.document(SCAN, "choice")["lr"])


def optimizer_rate(run: RunFolder) -> float:
    """The learning rate of figure 4."""
    return run.config[Relax].optimizer_lr or chosen_rate(run)


def notes(run: RunFolder) -> list[str]:
    """How the learning rates were chosen, and what the drift contains besides the force."""
    factor = run.config[Relax].adam_lr_factor
    return [
        f"Relaxation of figures 3A and 3B: {run.document(SCAN, 'choice')['why']}. Figure 4: "
        f"learning rate {optimizer_rate(run):g}, for Adam {factor:g} times that. With momentum 0.9 "
        "a step is effectively ten times as large, and Adam rescales its steps, so effective "
        "time, updates x lr, compares optimizers only in the paper's sense.",
        "No figure subtracts descent: the loss along a path is low but not flat, so part of every "
        "drift is descent. The displacement at the largest batch size bounds that part.",
        "A path is a choice: one that is optimized longer, or with smaller batches, is flatter, "
        "because the noise of its own updates is an entropic force too. Between pivots the "
        "polyline cuts corners, and its loss is higher there (figure 2C).",
    ]


def _settings(run: RunFolder, starts: Sequence[float], rates: Sequence[float]) -> Settings:
    return [(s, lr) for s, lr in product(starts, rates) for _ in range(run.config[Relax].replicas)]


def _panel(
    run: RunFolder,
    progress: Progress,
    task: str,
    panel: str,
    starts: Sequence[float] = (),
    *,
    rate: float = 0.0,
    batch_size: int = 0,
    optimizer: str = "sgd",
    project_every: int = 0,
) -> dict[str, Any]:
    """Trajectories from every start, by default at the settings of the scan.

    Replicas that the scan has are copied from it: the same noise makes the same trajectory.
    """
    section, setup, base = run.config[Relax], _first(run), [_start(run)]
    size, every = batch_size or section.batch_size, project_every or setup.project_every
    settings = _settings(run, starts or base, [rate or chosen_rate(run)])
    shared: set[tuple[float, float]] = set()
    if (size, every, optimizer) == (section.batch_size, setup.project_every, "sgd"):
        shared = set(settings) & set(_settings(run, base, section.lrs))
    missing = [setting for setting in settings if setting not in shared]
    tables = [run.table(SCAN, "trajectory")] if shared else []
    if missing:
        setup = replace(setup, project_every=every)
        tables.append(relaxation.along(run, progress, task, panel, setup, missing, size, optimizer))
    found = {key: rows for table in tables for key, rows in table.group_by("start", "lr").items()}
    tracks = [
        track for key in dict.fromkeys(settings) for track in found[key].group_by("run").values()
    ]
    rows = [
        {**row, "panel": panel, "run": i} for i, track in enumerate(tracks) for row in track.rows()
    ]
    return {"trajectory": Table.from_rows(rows)}


def _first(run: RunFolder) -> RelaxationSetup:
    """The run's first path."""
    name, first, *_ = _inputs.path_names(run)[0]
    section = run.config[Relax]
    objective = _inputs.objective(run, _inputs.minimum(run, first))
    path = _inputs.load_path(run, name)
    return relaxation.relaxation_setup(run, objective, path, section.steps, section.replicas)


def _choose(trajectory: Trajectory, fixed: float) -> dict[str, Any]:
    """The learning rate asked for; if 0, the lowest that moves beyond its interval."""
    if fixed:
        return {"lr": fixed, "why": f"learning rate {fixed:g} as configured"}
    rates = sorted(set(trajectory.lr.tolist()))
    listed = ", ".join(f"{r:g}" for r in rates)
    for lr in rates:
        left = (trajectory.lr == lr) & ~trajectory.diverged
        if not bool(left.any()):
            continue
        moved = displacement(trajectory.select(left), statistic="median")
        if moved.low * moved.high > 0 and abs(moved.value) > MINIMUM_DISPLACEMENT:
            return {
                "lr": lr,
                "why": f"learning rate {lr:g}, the lowest of {listed} at which the median "
                f"displacement ({moved.value:+.4f} of the path) is beyond "
                f"{MINIMUM_DISPLACEMENT:g} and its {100 * moved.confidence:.0f} % interval "
                f"({moved.low:+.4f} to {moved.high:+.4f}) leaves out 0",
            }
    return {
        "lr": rates[-1],
        "why": f"learning rate {rates[-1]:g}, the largest: at none of {listed} was the median "
        f"displacement beyond {MINIMUM_DISPLACEMENT:g} of the path and its own interval",
    }


def _start(run: RunFolder) -> float:
    return run.config[Relax].start or _midpoints(run)[1]  # between the second and third pivots


def _midpoints(run: RunFolder) -> list[float]:
    positions = _inputs.load_path(run, _inputs.path_names(run)[0][0]).positions.tolist()
    return [(a + b) / 2 for a, b in pairwise(positions)]


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    section = run.config[Relax]
    sizes, cycles = section.batch_sizes, section.cycles
    names = ["A", *(f"B-{b}" for b in sizes), "C", *(f"D-{k}" for k in cycles)]
    table = relaxation.collect(run, names)
    survived, scaling = survival.survival(table)
    found = {
        "fig3_relaxation": table,
        "fig3_bands": relaxation.bands(table),
        "fig3_times": relaxation.times(table),
        "fig3_survival": survived,
    }
    # Too few arrivals leave nothing to fit.
    return {**found, "fig3_scaling": scaling} if scaling.num_rows else found
