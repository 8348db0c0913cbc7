"""Replicas of one run shared out among processes, and put together again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ..._utils.convergence import DivergenceError
from ...distributed import Communicator
from ._trajectory import Trajectory

NUMBERS = ("position", "distance", "loss", "full_loss")


def over_processes(
    run: Callable[..., Trajectory],
    given: Mapping[str, Any],
    starts: Tensor,
    lrs: Tensor,
    ids: Sequence[int],
) -> Trajectory:
    """Each process runs replicas in a row by themselves; all get the trajectory of all.

    Args:
        run: `relax`.
        given: its arguments, by name; the objective has a `communicator`.
        starts, lrs, ids: of every replica.  # [R] each

    Raises:
        ValueError: files to write to, of which each process would want its own.
        DivergenceError: every replica of every process diverged.
        RankFailedError, RankLostError: as `Communicator.all_reduce`.
    """
    for name in ("record_to", "checkpoint"):
        if given[name] is not None:
            raise checks.invalid(
                name,
                "None where processes share the replicas",
                checks.shown(given[name]),
                "on each rank relax(obj.without_distribution(), ids=...), with its own file",
            )
    communicator: Communicator = given["obj"].communicator
    plain = (bool, int, float, str, tuple, type(None))
    settings = {name: v for name, v in given.items() if isinstance(v, plain)}
    settings |= {"start": starts.tolist(), "lr": lrs.tolist(), "ids": list(ids)}  # type: ignore[dict-item]
    communicator.check_consistent(
        None, "relax", settings, given["path"].pivots, given["obj"].fingerprint()
    )
    first, last = communicator.range(len(starts))
    own: Trajectory | None = None
    failure: Exception | None = None
    if first < last:
        part = slice(first, last)
        mine = {
            **given,
            **dict(obj=given["obj"].without_distribution(), replicas=1),
            **dict(start=starts[part].tolist(), lr=lrs[part].tolist(), ids=list(ids[part])),
        }
        try:
            own = run(**mine)
        except DivergenceError as error:
            own = error.partial
        except Exception as error:
            failure = error
    communicator.check_consistent(failure, "replicas")
    found = _together(communicator, own, first, len(starts), lrs, ids)
    if bool(found.diverged.all()):
        raise DivergenceError(f"relax: all {len(starts)} replicas diverged; lower lr", found)
    return found


def _together(
    communicator: Communicator,
    own: Trajectory | None,
    first: int,
    replicas: int,
    lrs: Tensor,
    ids: Sequence[int],
) -> Trajectory:
    # One whose replicas all diverged ends early; the longest says when records were made.
    lengths = communicator.all_gather([0 if own is None else len(own.steps)])
    records = max(length for (length,) in lengths)
    leader = lengths.index([records])
    about = {} if own is None else {
        "fixed": list(own.fixed_losses), "steps": own.steps.tolist(), "optimizer": own.optimizer,
        "batch_size": own.batch_size, "project_every": own.project_every, "seed": own.seed,
        "engine": own.engine,
    }  # fmt: skip
    about = json.loads(communicator.broadcast_text(json.dumps(about), leader))
    fixed = about.pop("fixed")
    numbers = torch.zeros(len(NUMBERS) + len(fixed), replicas, records, dtype=torch.float64)
    lost, notes = torch.zeros(replicas, dtype=torch.float64), ""
    if own is not None:
        rows = slice(first, first + own.num_replicas)
        numbers[:, rows] = math.nan
        every = [getattr(own, n) for n in NUMBERS] + [own.fixed_losses[n] for n in fixed]
        numbers[:, rows, : len(own.steps)] = torch.stack(every)
        lost[rows] = own.diverged_at.double()
        notes = "\n".join(own.notes)
    numbers = communicator.all_reduce(lambda: numbers.to(communicator.device), "records").cpu()
    lost = communicator.all_reduce(lambda: lost.to(communicator.device), "losses of replicas").cpu()
    said = [
        communicator.broadcast_text(notes, rank).splitlines() for rank in range(communicator.size)
    ]
    return Trajectory(
        **dict(zip(NUMBERS, numbers, strict=False)),
        steps=torch.tensor(about.pop("steps")),
        lr=lrs.double().cpu(),
        ids=torch.tensor(ids),
        diverged_at=lost.long(),
        notes=tuple(dict.fromkeys(note for lines in said for note in lines)),
        fixed_losses=dict(zip(fixed, numbers[len(NUMBERS) :], strict=True)),
        **about,
    )
