"""Relaxation runs behind figures 3 and 4: which, at what settings, as one long table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._utils.atomic_io import DamagedFileError
from ..._utils.table import Table
from ...dynamics import (
    Checkpointing,
    CheckpointMismatchError,
    DivergenceError,
    ProjectedSGD,
    Recording,
    Trajectory,
    displacement,
    relax,
    relaxation_time,
)
from ...objective import Objective
from ...paths import Path
from .. import _inputs as pieces
from .._executor import Progress, Task
from .._run_folder import RunFolder
from .._task_store import TaskStore
from ..claims._intervals import mean_interval

Settings = Sequence[tuple[float, float]]  # start and learning rate of each replica


@dataclass(frozen=True)
class RelaxationSetup:
    """What replicas relax on, for how long, and how often they are projected and recorded."""

    objective: Objective
    path: Path
    steps: int
    replicas: int
    project_every: int = 15
    records: int = 100
    seed: int = 0


def relaxation_setup(
    run: RunFolder, objective: Objective, path: Path, steps: int, replicas: int
) -> RelaxationSetup:
    """A setup with the run's projection, records and seed."""
    section = run.config.relax
    every, records = section.project_every, section.records
    return RelaxationSetup(objective, path, steps, replicas, every, records, run.config.seed)


SCAN = "relax/C"  # the learning-rate scan, from which the rule chooses


def tasks(run: RunFolder) -> list[Task]:
    """The scan over learning rates first; starts, batch sizes, k and optimizers at the rate chosen.

    Settings that the scan has (the base start and batch size, vanilla SGD) are taken from it.
    """
    section = run.config.relax
    path = f"path/{pieces.path_names(run)[0][0]}"

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
    section = run.config.relax
    settings = _settings(run, [_start(run)], section.lrs)
    trajectory = _relax(run, progress, SCAN, _first(run), settings, section.batch_size, "sgd")
    table = _long(trajectory, "C", settings, section.replicas)
    return {"trajectory": table, "choice": _choose(trajectory, section.lr)}


def relax_starts(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Panel A: several starting points."""
    section = run.config.relax
    starts = section.starts or _midpoints(run)[section.start_every - 1 :: section.start_every]
    settings = _settings(run, starts, [chosen_rate(run)])
    return {
        "trajectory": _panel(run, progress, "relax/A", "A", settings, section.batch_size, "sgd")
    }


def relax_batch(run: RunFolder, progress: Progress, size: int) -> dict[str, Any]:
    """Panel B: one batch size."""
    settings = _settings(run, [_start(run)], [chosen_rate(run)])
    return {"trajectory": _panel(run, progress, f"relax/B-{size}", "B", settings, size, "sgd")}


def relax_cycle(run: RunFolder, progress: Progress, every: int) -> dict[str, Any]:
    """Panel D: one number k of updates between projections."""
    settings, size = _settings(run, [_start(run)], [chosen_rate(run)]), run.config.relax.batch_size
    task = f"relax/D-{every}"
    return {"trajectory": _panel(run, progress, task, "D", settings, size, "sgd", every)}


def relax_optimizer(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Figure 4: one optimizer at the base batch size; Adam at its own multiple of the rate."""
    section = run.config.relax
    factor = section.adam_lr_factor if name == "adam" else 1.0
    settings = _settings(run, [_start(run)], [optimizer_rate(run) * factor])
    task = f"relax/{name}"
    return {"trajectory": _panel(run, progress, task, "4", settings, section.batch_size, name)}


def chosen_rate(run: RunFolder) -> float:
    """The learning rate of panels A and B."""
    return float(run.document(SCAN, "choice")["lr"])


def optimizer_rate(run: RunFolder) -> float:
    """The learning rate of figure 4."""
    return run.config.relax.optimizer_lr or chosen_rate(run)


def choice_text(run: RunFolder) -> str:
    """How that rate was chosen, for captions."""
    return str(run.document(SCAN, "choice")["why"])


def collect(run: TaskStore, names: Sequence[str], stage: str = "relax") -> Table:
    """Trajectories of several tasks as one table; `run` numbers the replicas."""
    rows: list[dict[str, object]] = []
    offset = 0
    for name in names:
        table = run.table(f"{stage}/{name}", "trajectory")
        rows += [{**row, "run": offset + int(row["run"])} for row in table.rows()]  # type: ignore[call-overload]
        offset += int(table["run"].max()) + 1
    return Table.from_rows(rows)


def bands(table: Table) -> Table:
    """Mean position over replicas by setting and update, with Student's 95 % interval.

    Replicas that diverged are left out from there on; the interval of fewer than two is NaN.
    """
    rows = []
    for values, replicas in by_setting(table):
        position = np.stack([np.asarray(r["position"], dtype=float) for r in replicas])
        for i, step in enumerate(replicas[0]["step"].tolist()):
            alive = position[np.isfinite(position[:, i]), i]
            if not len(alive):
                continue
            low, high = mean_interval(alive)
            rows.append(
                {
                    **values,
                    "step": step,
                    "effective_time": values["lr"] * step,
                    "mean": float(alive.mean()),
                    "low": low,
                    "high": high,
                    "replicas": len(alive),
                }
            )
    return Table.from_rows(rows)


def by_setting(table: Table) -> Iterator[tuple[dict[str, Any], list[Table]]]:
    """The settings of a table of trajectories, each with its replicas' rows."""
    keys = ("panel", "optimizer", "start", "lr", "batch_size", "project_every")
    for setting in dict.fromkeys(zip(*(table[k].tolist() for k in keys), strict=True)):
        values = dict(zip(keys, setting, strict=True))
        part = table.where(**values)
        yield values, [part.where(run=r) for r in np.unique(part["run"])]


def times(table: Table) -> Table:
    """Relaxation times by setting: updates until half the distance from the nearest end is left.

    The median over replicas with its interval between order statistics; replicas that did not
    get there are censored, and then the median may be a lower bound, or unbounded above.
    """
    rows = []
    for values, replicas in by_setting(table):
        position = torch.tensor(np.stack([r["position"] for r in replicas]), dtype=torch.float64)
        if not 0 < values["start"] < 1:
            continue
        found = relaxation_time(
            trajectory_of(
                position,
                torch.as_tensor(replicas[0]["step"]),
                torch.full((len(replicas),), values["lr"], dtype=torch.float64),
                str(values["optimizer"]),
                int(values["batch_size"]),
                int(values["project_every"]),
            ),
            target=0.0 if values["start"] <= 0.5 else 1.0,
        )
        median = found.median
        rows.append(
            {
                **values,
                "median_updates": median.value / values["lr"],
                "low": median.low / values["lr"],
                "high": median.high / values["lr"],
                "confidence": median.confidence,
                "lower_bound": found.lower_bound,
                "arrived": int((~found.censored).sum()),
                "replicas": len(replicas),
            }
        )
    return Table.from_rows(rows)


def trajectory_of(
    position: Tensor,
    steps: Tensor,
    lr: Tensor,
    optimizer: str,
    batch_size: int,
    project_every: int,
) -> Trajectory:
    """A trajectory of which only the positions are known."""
    unknown = torch.full_like(position, math.nan)
    return Trajectory(
        position=position,
        distance=unknown,
        loss=unknown,
        full_loss=unknown,
        steps=steps,
        lr=lr,
        ids=torch.arange(len(position)),
        diverged_at=torch.where(position.isfinite().all(1), -1, 0),
        optimizer=optimizer,
        batch_size=batch_size,
        project_every=project_every,
        seed=0,
        backend="",
    )


def _settings(run: RunFolder, starts: Sequence[float], rates: Sequence[float]) -> Settings:
    return [(s, lr) for s, lr in product(starts, rates) for _ in range(run.config.relax.replicas)]


def _panel(
    run: RunFolder,
    progress: Progress,
    task: str,
    panel: str,
    settings: Settings,
    batch_size: int,
    optimizer: str,
    project_every: int = 0,
) -> Table:
    """Settings in order, from the scan where it has them: the same noise makes the same run."""
    setup = _first(run)
    if project_every:
        setup = replace(setup, project_every=project_every)
    scan = (run.config.relax.batch_size, run.config.relax.project_every, "sgd")
    scanned = (batch_size, setup.project_every, optimizer) == scan
    shared = set(settings) & set(_settings(run, [_start(run)], run.config.relax.lrs))
    shared = shared if scanned else set()
    missing = [setting for setting in settings if setting not in shared]
    tables = []
    if missing:
        tables = [along(run, progress, task, panel, setup, missing, batch_size, optimizer)]
    if shared:
        tables.append(run.table(SCAN, "trajectory"))
    tracks: list[list[dict[str, object]]] = []
    for start, lr in dict.fromkeys(settings):
        found = next(t for table in tables if (t := table.where(start=start, lr=lr)).num_rows)
        tracks += [
            found.where(run=number).rows() for number in dict.fromkeys(found["run"].tolist())
        ]
    rows = [{**row, "panel": panel, "run": i} for i, track in enumerate(tracks) for row in track]
    return Table.from_rows(rows)


def along(
    run: TaskStore,
    progress: Progress,
    task: str,
    panel: str,
    setup: RelaxationSetup,
    settings: Settings,
    batch_size: int,
    optimizer: str = "sgd",
) -> Table:
    """Trajectories of every setting's replicas as a long table."""
    trajectory = _relax(run, progress, task, setup, settings, batch_size, optimizer)
    return _long(trajectory, panel, settings, setup.replicas)


def _first(run: RunFolder) -> RelaxationSetup:
    """The run's first path."""
    name, first, *_ = pieces.path_names(run)[0]
    section = run.config.relax
    objective = pieces.objective(run, pieces.minimum(run, first))
    path = pieces.load_path(run, name)
    return relaxation_setup(run, objective, path, section.steps, section.replicas)


def _relax(
    run: TaskStore,
    progress: Progress,
    task: str,
    setup: RelaxationSetup,
    settings: Settings,
    batch_size: int,
    optimizer: str,
) -> Trajectory:
    """The run of a task, from where it was killed if it was."""
    every = setup.project_every
    stored = run.task_folder(task) / "run.safetensors"
    # Processes that share replicas have no one state to write.
    checkpoint = None
    if setup.objective.communicator.size == 1:
        checkpoint = Checkpointing(stored, CHECKPOINT_CYCLES * every)

    def go() -> Trajectory:
        return relax(
            setup.objective,
            setup.path,
            [s for s, _ in settings],
            ProjectedSGD(
                [lr for _, lr in settings],
                batch_size,
                project_every=every,
                steps=setup.steps,
                optimizer=optimizer,
            ),
            # The same noise at every setting: differences between settings are not the noise's.
            replicas=[i % setup.replicas for i in range(len(settings))],
            seed=setup.seed,
            recording=Recording(
                every=max(1, setup.steps // (setup.records * every)) * every,
                callback=lambda record: progress(record.step / setup.steps),
            ),
            checkpoint=checkpoint,
        )

    try:
        try:
            trajectory = go()
        except (CheckpointMismatchError, DamagedFileError):  # of a path since computed anew
            stored.unlink(missing_ok=True)
            trajectory = go()
    except DivergenceError:
        # A result too, and no reason to lose the rest of the run: a start, then nothing.
        lost = torch.tensor([[s, math.nan] for s, _ in settings], dtype=torch.float64)
        rates = torch.tensor([lr for _, lr in settings], dtype=torch.float64)
        steps = torch.tensor([0, setup.steps])
        trajectory = trajectory_of(lost, steps, rates, optimizer, batch_size, every)
    stored.unlink(missing_ok=True)  # only a task's results are stored
    return trajectory


def _long(trajectory: Trajectory, panel: str, settings: Settings, replicas: int) -> Table:
    count = len(trajectory.steps)
    columns: dict[str, list[Any]] = {
        key: []
        for key in (
            "panel",
            "run",
            "replica",
            "optimizer",
            "start",
            "lr",
            "batch_size",
            "project_every",
            "step",
            "effective_time",
            "position",
            "distance",
            "loss",
        )
    }
    steps = trajectory.steps.tolist()
    for i, (start, lr) in enumerate(settings):
        columns["panel"] += [panel] * count
        columns["run"] += [i] * count
        columns["replica"] += [i % replicas] * count
        columns["optimizer"] += [trajectory.optimizer] * count
        columns["start"] += [start] * count
        columns["lr"] += [lr] * count
        columns["batch_size"] += [trajectory.batch_size] * count
        columns["project_every"] += [trajectory.project_every] * count
        columns["step"] += steps
        columns["effective_time"] += [lr * step for step in steps]
        columns["position"] += trajectory.position[i].tolist()
        columns["distance"] += trajectory.distance[i].tolist()
        columns["loss"] += trajectory.loss[i].tolist()
    return Table(columns)


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


CHECKPOINT_CYCLES = 50  # between checkpoints: seconds of work
MINIMUM_DISPLACEMENT = 0.01  # of the path: below it nothing can be seen in a figure


def _start(run: RunFolder) -> float:
    return run.config.relax.start or _midpoints(run)[1]  # between the second and third pivots


def _midpoints(run: RunFolder) -> list[float]:
    positions = pieces.load_path(run, pieces.path_names(run)[0][0]).positions.tolist()
    return [(a + b) / 2 for a, b in pairwise(positions)]
