"""Projected SGD: k updates in the full space, then projection onto the path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from ..._torch.full_precision import products_in
from ..._utils import checks, trees
from ..._utils.convergence import DivergenceError
from ...objective import Objective
from ...paths import Path
from . import _gradient_backends as backends
from ._checkpoint import Checkpoint, fingerprint
from ._cuda_graph import GraphedCycles
from ._distributed import over_processes
from ._evaluation import Evaluation
from ._minibatches import Minibatches
from ._optimizers import Optimizer
from ._records import InMemory, Record, Records, ToFile
from ._replica_state import ReplicaState
from ._settings import (
    BACKENDS,
    Arguments,
    Checkpointing,
    Execution,
    PerReplica,
    ProjectedSGD,
    Recording,
    check_path,
    per_replica,
    require_settings,
)
from ._trajectory import Trajectory


def relax(
    obj: Objective,
    path: Path,
    start: PerReplica,
    sgd: ProjectedSGD,
    *,
    replicas: int | Sequence[int] = 1,
    seed: int = 0,
    recording: Recording = Recording(),
    checkpoint: str | os.PathLike[str] | Checkpointing | None = None,
    execution: Execution = Execution(),
) -> Trajectory:
    """Relax along a path by projected SGD ("k-SGD"; figures 3 and 4 of the paper).

    Each replica starts on the path and repeats: k optimizer updates on minibatches in the full
    space, then projection onto the nearest point of the path. Projection leaves momentum buffers
    and Adam's state as they are.

    Layers with running statistics use those of each minibatch, as in training, independent of
    `obj.norm`. Minibatches are epochs of permutations without replacement, a function of (seed,
    replica id, step), so adding replicas does not change the others (up to rounding). Each
    minibatch's gradient is an unbiased estimate of the full gradient: a torch loss that is a mean
    over counted targets is divided by the count over the entire data.

    Two controls have no entropic force: `batch_size` equal to the number of examples (no noise),
    and `project_every=1` (fast directions never fluctuate).

    Args:
        obj: the loss and the data to draw from.
        path: in the parameters of `obj`.
        start: position on the path in [0, 1], or one per replica.
        sgd: the optimizer. For replicas that differ in more than the learning rate see
            `relax_many`.
        replicas: how many, or the ids of their noise (default 0 .. R - 1); replicas of one id see
            the same minibatches.
        seed: of the minibatches.
        recording: what is recorded.
        checkpoint: a file name, or `Checkpointing`.
        execution: how gradients are computed.

    Returns:
        positions, distances and losses by replica and record. A replica whose loss or parameters
        become NaN or infinite, or that goes too far, is NaN from there on; the others continue.

    Raises:
        ValueError: arguments that do not fit one another.
        CheckpointMismatchError: a checkpoint of other settings, data or path.
        DivergenceError: every replica diverged; `partial` is the trajectory.

    >>> from entropic_fast import ProjectedSGD, linear_path
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> obj = Objective(torch.nn.Linear(2, 1, bias=False), "mse", (x, x[:, :1]))
    >>> path = linear_path(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> run = relax(obj, path, 0.2, ProjectedSGD(0.1, 4, project_every=5, steps=50), replicas=2)
    >>> run.steps[-1].item(), tuple(run.position.shape), bool((run.position[:, -1] > 0.7).all())
    (50, (2, 11), True)
    """
    check_path(obj, path)
    require_settings(sgd, recording, execution)
    starts, lrs, ids = per_replica(start, sgd.lr, replicas)
    if checkpoint is not None and not isinstance(checkpoint, Checkpointing):
        checkpoint = Checkpointing(checks.file_name("checkpoint", checkpoint))
    if sgd.weight_decay and obj.weight_decay:
        raise checks.invalid(
            "weight_decay",
            "0 for an objective with weight decay of its own",
            f"{sgd.weight_decay} beside {obj.weight_decay}",
            "pass one of the two",
        )
    recording = recording.resolved(sgd.project_every)
    arguments = Arguments(obj, path, starts, sgd, lrs, ids, seed, recording, checkpoint, execution)
    if obj.communicator.size > 1:
        return over_processes(relax, arguments)
    return _Relaxation(arguments).trajectory()


class _Relaxation:
    """One call of `relax` in one process."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments, obj = arguments, arguments.obj
        self._obj = obj = obj.with_norm("batch") if obj.has_running_statistics else obj
        path, sgd, recording = arguments.path, arguments.sgd, arguments.recording
        starts, lrs, ids, seed = arguments.starts, arguments.lrs, arguments.ids, arguments.seed
        self._evaluation = Evaluation(obj, recording)
        self._minibatches = Minibatches(obj, sgd.batch_size, seed, ids, sgd.augment)
        execution, checkpoint = arguments.execution, arguments.checkpoint
        backend = execution.backend
        self._checkpoint: Checkpoint | None = None
        self._stored: dict[str, Tensor] | None = None
        if checkpoint is not None:
            self._every = checkpoint.interval(sgd.project_every)
            self._checkpoint = Checkpoint(File(checkpoint.path), self._fingerprint())
            self._stored = self._checkpoint.load()
            if self._stored is not None and backend == "auto":
                # The choice may depend on the number of threads: keep that of the checkpoint.
                backend = BACKENDS[int(self._stored["backend"])]
        self._backend, self._gradients, self._note = backends.choose(
            backend, obj, path.point(starts).contiguous(), *self._minibatches(0)
        )
        optimizer = Optimizer(sgd, lrs.to(path.pivots.device))
        self._state = ReplicaState(
            path, starts, optimizer, self._minibatches, self._gradients, sgd.max_distance
        )
        self._cycles = GraphedCycles(self._state, sgd.project_every, execution.cuda_graphs)
        self._metadata = {
            "optimizer": sgd.optimizer,
            "batch_size": sgd.batch_size,
            "seed": seed,
            "project_every": sgd.project_every,
            "backend": self._backend,
        }
        self._records: Records = InMemory()
        if recording.to is not None:
            names = list(self._evaluation.datasets)
            self._records = ToFile(File(recording.to), starts, lrs, ids, self._metadata, names)

    def _fingerprint(self) -> dict[str, Any]:
        obj, datasets = self._obj, self._evaluation.datasets
        return {
            **self._arguments.fingerprint(),
            "datasets": {
                name: fingerprint(*trees.leaves(held_out.tensors()))
                for name, held_out in datasets.items()
            },
            "path": fingerprint(self._arguments.path.pivots),
            "data": fingerprint(*trees.leaves(obj.tensors())),
            "model": fingerprint(*obj.frozen_tensors()),
            "loss": obj.loss_name,
            "objective_weight_decay": obj.weight_decay,
        }

    def trajectory(self) -> Trajectory:
        """Run from the start or the checkpoint to the end."""
        try:
            self._resume()
            self._run()
            graphs = "+graphs" if self._cycles.captured else ""
            notes = [note for note in (self._note, self._cycles.note) if note] + self._lost()
            self._metadata |= {"backend": self._backend + graphs, "notes": notes}
            self._records.close(self._metadata)
        finally:
            self._records.close()
            backends.close(self._gradients)
        if self._arguments.recording.to is not None:
            file = str(self._arguments.recording.to)
            notes.append(f"the start and the last record; Trajectory.load({file!r}) reads all")
        lrs, ids = self._arguments.lrs, self._arguments.ids
        trajectory = Trajectory.from_records(self._records.kept(), lrs, ids, self._metadata)
        if not len(self._state.alive):
            raise self._divergence(trajectory)
        return trajectory

    def _resume(self) -> None:
        if self._stored is None:
            return
        self._state.restore(self._stored)
        self._records.restore(self._stored)
        steps = self._arguments.sgd.steps
        if self._state.step > steps:
            raise checks.invalid(
                "steps", f"at least the checkpoint's {self._state.step}", str(steps)
            )

    def _run(self) -> None:
        state, arguments = self._state, self._arguments
        sgd, every = arguments.sgd, arguments.recording.every
        assert every is not None
        while state.step < sgd.steps and len(state.alive):
            first = state.step == 0
            with products_in(arguments.execution.precision):
                self._cycles(min(sgd.project_every, sgd.steps - state.step))
            if first:
                self._record(state.first_record(arguments.starts, self._evaluation))
            if state.step % every == 0 or state.step == sgd.steps or not len(state.alive):
                self._record(state.record(self._evaluation))
            # Not after the last cycle, which may be shorter: a resumed run may have more steps.
            if self._checkpoint and state.step % self._every == 0 and state.step < sgd.steps:
                chosen = {"backend": torch.tensor(BACKENDS.index(self._backend))}
                self._checkpoint.save(state.state() | self._records.state() | chosen)

    def _record(self, record: Record) -> None:
        self._records.append(record)
        if self._arguments.recording.callback is not None:
            self._arguments.recording.callback(record)

    def _lost(self) -> list[str]:
        lrs, ids = self._arguments.lrs, self._arguments.ids
        return [
            f"replica {r} (id {ids[r]}, lr {float(lrs[r])}) diverged at update {at} and is NaN "
            "from there on"
            for r, at in enumerate(self._state.diverged_at.tolist())
            if at >= 0
        ]

    def _divergence(self, trajectory: Trajectory) -> DivergenceError:
        at, arguments = self._state.diverged_at, self._arguments
        first = int(at.argmin())
        return DivergenceError(
            f"relax: all {len(arguments.ids)} replicas diverged; replica {first} (id "
            f"{arguments.ids[first]}) at update {int(at[first])} with {arguments.sgd.optimizer}, "
            f"lr {float(arguments.lrs[first])}; lower lr",
            trajectory,
        )
