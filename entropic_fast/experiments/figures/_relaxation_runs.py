"""Projected SGD for the figures: its settings, its run with checkpoints, its long tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from ..._utils import checks
from ..._utils.atomic_io import DamagedFileError
from ..._utils.table import Table
from ...dynamics import (
    Checkpointing,
    CheckpointMismatchError,
    DivergenceError,
    ProjectedSGD,
    Recording,
    Trajectory,
    relax,
    relaxation_time,
)
from ...dynamics.projected_sgd import OPTIMIZERS
from ...objective import Objective
from ...paths import Path
from .._executor import Progress
from .._run_folder import RunFolder
from .._sections import (
    Config,
    Count,
    Distinct,
    Number,
    Position,
    Positions,
    Positive,
    Section,
    rejected,
)
from .._task_store import TaskStore
from ..claims._intervals import mean_interval


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise rejected("one of " + ", ".join(map(repr, OPTIMIZERS)), name)
    return name


class Relax(Section):
    """Projected SGD on the first path.

    `lr` is the learning rate of figures 3A and 3B. With 0 it is chosen among `lrs`: the lowest
    one at which the median displacement exceeds its 95 % interval. `optimizer_lr` is the rate of
    figure 4 (0: the same); Adam uses `adam_lr_factor` times it. Figure 3A starts at `starts`, or
    in the middle of every `start_every`-th segment of the path. Figure 3D (ours) varies the
    number of updates between projections over `cycles`.
    """

    toml = "relax"
    lr: Number = 0.02
    batch_size: Count = 16
    project_every: Count = 15
    steps: Count = 4500
    replicas: Count = 4
    starts: Positions = ()
    start_every: Count = 1
    start: Position = 0.0
    batch_sizes: Distinct[Count] = (16, 32, 64, 128, 256)
    lrs: Distinct[Positive] = (0.005, 0.01, 0.02, 0.04)
    cycles: tuple[Count, ...] = ()
    optimizers: Distinct[Annotated[str, AfterValidator(_known_optimizer)]] = (
        "sgd",
        "nesterov",
        "adam",
    )
    optimizer_lr: Number = 0.0
    adam_lr_factor: Positive = 1.0
    records: Count = 100

    def check(self, config: Config) -> None:
        """Starts are in the middle of segments that the path has."""
        require_segments("relax.start_every", self.start_every, config)

    def images_needed(self) -> dict[str, int]:
        """The largest minibatch."""
        return {"batch_size": self.batch_size, "batch_sizes": max(self.batch_sizes)}


def require_segments(key: str, count: int, config: Config) -> None:
    """Reject a setting that asks for more segments than a new path has."""
    segments = config.path.pivots - 1
    if count > segments:
        expected = f"at most the {segments} segments of a path of path.pivots"
        raise checks.invalid(key, expected, str(count))


Settings = Sequence[tuple[float, float]]  # start and learning rate of each replica
CHECKPOINT_CYCLES = 50  # between checkpoints: seconds of work
KEYS = ("panel", "optimizer", "start", "lr", "batch_size", "project_every")  # of a setting


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
    section = run.config[Relax]
    every, records = section.project_every, section.records
    return RelaxationSetup(objective, path, steps, replicas, every, records, run.config.seed)


def collect(run: TaskStore, names: Sequence[str], stage: str = "relax") -> Table:
    """Trajectories of several tasks as one table; `run` numbers the replicas."""
    tables: list[Table] = []
    offset = 0
    for name in names:
        table = run.table(f"{stage}/{name}", "trajectory")
        tables.append(Table({**table, "run": offset + table["run"]}))
        offset += int(table["run"].max()) + 1
    return Table.concatenated(tables)


def bands(table: Table) -> Table:
    """Mean position over replicas by setting and update, with Student's 95 % interval.

    Replicas count until they diverge; the interval of fewer than two is NaN.
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
    for setting, rows in table.group_by(*KEYS).items():
        yield (
            dict(zip(KEYS, setting, strict=True)),
            [replica for _, replica in sorted(rows.group_by("run").items())],
        )


def times(table: Table) -> Table:
    """Relaxation times by setting: updates until half the distance from the nearest end is left.

    The median over replicas with its interval between order statistics. Replicas that did not
    arrive are censored; the median may then be a lower bound, or unbounded above.
    """
    rows = []
    for values, replicas in by_setting(table):
        if not 0 < values["start"] < 1:
            continue
        found = relaxation_time(trajectory_of(replicas, values["lr"]), target=nearest_end(values))
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


def nearest_end(values: Mapping[str, Any]) -> float:
    """The end of the path nearest to a setting's start."""
    return 0.0 if values["start"] <= 0.5 else 1.0


def trajectory_of(replicas: Sequence[Table], lr: float) -> Trajectory:
    """The trajectory of one setting's replicas, of which only the positions are known."""
    first = replicas[0].rows()[0]
    return positions_alone(
        torch.tensor(np.stack([r["position"] for r in replicas]), dtype=torch.float64),
        torch.as_tensor(replicas[0]["step"]),
        torch.full((len(replicas),), lr, dtype=torch.float64),
        str(first["optimizer"]),
        int(first["batch_size"]),
        int(first["project_every"]),
    )


def positions_alone(
    position: Tensor, steps: Tensor, lr: Tensor, optimizer: str, batch_size: int, project_every: int
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
    trajectory = run_replicas(run, progress, task, setup, settings, batch_size, optimizer)
    return long_table(trajectory, panel, settings, setup.replicas)


def run_replicas(
    run: TaskStore,
    progress: Progress,
    task: str,
    setup: RelaxationSetup,
    settings: Settings,
    batch_size: int,
    optimizer: str,
) -> Trajectory:
    """Relax every setting's replicas, from a task's checkpoint if there is one."""
    every = setup.project_every
    stored = run.task_folder(task) / "run.safetensors"
    # Ranks that share the replicas have no common state to write.
    checkpoint = None
    if setup.objective.communicator.size == 1:
        checkpoint = Checkpointing(stored, CHECKPOINT_CYCLES * every)
    starts, rates = [s for s, _ in settings], [lr for _, lr in settings]
    go = partial(
        relax,
        setup.objective,
        setup.path,
        starts,
        ProjectedSGD(
            rates, batch_size, project_every=every, steps=setup.steps, optimizer=optimizer
        ),
        # The noise is the same at every setting, so that it is not what settings differ by.
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
        except (CheckpointMismatchError, DamagedFileError):  # the path was computed again since
            stored.unlink(missing_ok=True)
            trajectory = go()
    except DivergenceError:
        # A result too, which must not end the run: the starts, then nothing.
        position = torch.tensor([[s, math.nan] for s in starts], dtype=torch.float64)
        steps, lr = torch.tensor([0, setup.steps]), torch.tensor(rates, dtype=torch.float64)
        trajectory = positions_alone(position, steps, lr, optimizer, batch_size, every)
    stored.unlink(missing_ok=True)  # only a task's results are stored
    return trajectory


def long_table(trajectory: Trajectory, panel: str, settings: Settings, replicas: int) -> Table:
    """One row per record of each replica."""
    records = [getattr(trajectory, name).tolist() for name in ("position", "distance", "loss")]
    return Table.from_rows(
        [
            {
                "panel": panel,
                "run": i,
                "replica": i % replicas,
                "optimizer": trajectory.optimizer,
                "start": start,
                "lr": lr,
                "batch_size": trajectory.batch_size,
                "project_every": trajectory.project_every,
                "step": step,
                "effective_time": lr * step,
                "position": position,
                "distance": distance,
                "loss": loss,
            }
            for i, ((start, lr), *own) in enumerate(zip(settings, *records, strict=True))
            for step, position, distance, loss in zip(trajectory.steps.tolist(), *own, strict=True)
        ]
    )
