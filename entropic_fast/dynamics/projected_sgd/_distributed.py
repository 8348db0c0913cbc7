"""Replicas of one run, distributed over ranks and gathered again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ..._utils.convergence import DivergenceError
from ...distributed import Communicator
from ._settings import Arguments
from ._trajectory import Trajectory

NUMBERS = ("position", "distance", "loss", "full_loss")


def over_processes(relax: Callable[..., Trajectory], arguments: Arguments) -> Trajectory:
    """Run a contiguous range of the replicas on each rank; every rank returns the full trajectory.

    Rejects files to write to, of which each rank would need one.
    """
    obj, path, recording = arguments.obj, arguments.path, arguments.recording
    starts, lrs, ids = arguments.starts, arguments.lrs, arguments.ids
    file = None if arguments.checkpoint is None else arguments.checkpoint.path
    for name, value in (("recording.to", recording.to), ("checkpoint", file)):
        if value is not None:
            raise checks.invalid(
                name,
                "None where replicas are distributed over processes",
                checks.shown(value),
                "on each rank relax(obj.without_distribution(), replicas=...), with its own file",
            )
    communicator = obj.communicator
    settings = {
        **arguments.fingerprint(),
        "datasets": sorted(recording.datasets),
        "steps": arguments.sgd.steps,
    }
    communicator.check_consistent(None, "relax", settings, path.pivots, obj.fingerprint())
    first, last = communicator.range(len(starts))
    local: Trajectory | None = None
    failure: Exception | None = None
    if first < last:
        try:
            local = relax(
                obj.without_distribution(),
                path,
                starts[first:last],
                arguments.sgd.replace(lr=lrs[first:last].tolist()),
                replicas=ids[first:last],
                seed=arguments.seed,
                recording=recording,
                execution=arguments.execution,
            )
        except DivergenceError as error:
            local = error.partial
        except Exception as error:
            failure = error
    communicator.check_consistent(failure, "replicas")
    trajectory = _gathered(communicator, local, first, lrs, ids)
    if bool(trajectory.diverged.all()):
        raise DivergenceError(f"relax: all {len(starts)} replicas diverged; lower lr", trajectory)
    return trajectory


def _gathered(
    communicator: Communicator,
    local: Trajectory | None,
    first: int,
    lrs: Tensor,
    ids: Sequence[int],
) -> Trajectory:
    """The trajectory of all replicas, of which `local` are those from `first` on."""
    # A rank whose replicas all diverged ends early: the longest record gives the steps.
    lengths = communicator.all_gather([0 if local is None else len(local.steps)])
    records = max(length for (length,) in lengths)
    leader = lengths.index([records])
    metadata: dict[str, Any] = {}
    if local is not None:
        names = ("optimizer", "batch_size", "project_every", "seed", "backend")
        metadata = {name: getattr(local, name) for name in names}
        metadata |= {"datasets": list(local.dataset_losses), "steps": local.steps.tolist()}
    metadata = json.loads(communicator.broadcast_text(json.dumps(metadata), leader))
    datasets = metadata.pop("datasets")
    numbers = torch.zeros(len(NUMBERS) + len(datasets), len(ids), records, dtype=torch.float64)
    lost, notes = torch.zeros(len(ids), dtype=torch.float64), ""
    if local is not None:
        rows = slice(first, first + local.num_replicas)
        numbers[:, rows] = math.nan
        columns = [getattr(local, n) for n in NUMBERS] + [local.dataset_losses[n] for n in datasets]
        numbers[:, rows, : len(local.steps)] = torch.stack(columns)
        lost[rows] = local.diverged_at.double()
        notes = "\n".join(local.notes)
    numbers = communicator.all_reduce(lambda: numbers.to(communicator.device), "records").cpu()
    lost = communicator.all_reduce(lambda: lost.to(communicator.device), "losses of replicas").cpu()
    notes_by_rank = [
        communicator.broadcast_text(notes, rank).splitlines() for rank in range(communicator.size)
    ]
    return Trajectory(
        **dict(zip(NUMBERS, numbers, strict=False)),
        steps=torch.tensor(metadata.pop("steps")),
        lr=lrs.double().cpu(),
        ids=torch.tensor(ids),
        diverged_at=lost.long(),
        notes=tuple(dict.fromkeys(note for lines in notes_by_rank for note in lines)),
        dataset_losses=dict(zip(datasets, numbers[len(NUMBERS) :], strict=True)),
        **metadata,
    )
