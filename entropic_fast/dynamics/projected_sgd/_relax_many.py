"""Replicas that differ in anything: grouped by what one run has in common, each group a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..._utils import checks
from ..._utils.convergence import DivergenceError
from ...objective import Objective
from ...objective._objective import require_objective
from ...paths._path import Path
from ._relax import relax
from ._trajectory import Trajectory

# What replicas of one run may differ in, and what groups may.
_PER_REPLICA = ("start", "lr", "id")
_PER_GROUP = (
    "optimizer",
    "batch_size",
    "project_every",
    "momentum",
    "weight_decay",
    "betas",
    "eps",
)


def relax_many(
    obj: Objective, path: Path, settings: Sequence[Mapping[str, Any]], **common: Any
) -> list[Trajectory]:
    """`relax` for replicas of different batch sizes and optimizers too.

    Replicas that share all but start, learning rate and id are one run, and advance together;
    such groups run in turn, each on all cores or the whole GPU. A replica's minibatches are
    named by its id, so grouping changes nobody's noise.

    Args:
        obj, path: as in `relax`.
        settings: of each replica: start, lr, id (default, its place in the list), optimizer,
            batch_size, project_every, momentum, weight_decay, betas, eps.
        common: arguments of `relax` for all, `steps` among them; a replica's settings go first.

    Returns:
        a trajectory of one replica for each of the settings, in their order. One that diverged
        is NaN from there on, and ends there if its whole group diverged.

    Raises:
        ValueError: an unknown setting, one that is missing, and as `relax`.

    >>> import torch
    >>> from entropic_fast.paths import linear_path
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(4, 1),) * 2)
    >>> path = linear_path(torch.tensor([0.0]), torch.tensor([1.0]))
    >>> settings = [dict(start=0.5, batch_size=b, lr=lr) for b in (2, 4) for lr in (0.1, 0.2)]
    >>> runs = relax_many(obj, path, settings, steps=15)
    >>> [run.batch_size for run in runs], [run.lr.item() for run in runs]
    ([2, 2, 4, 4], [0.1, 0.2, 0.1, 0.2])
    """
    require_objective(obj)
    for name in ("record_to", "checkpoint", "ids", "replicas"):
        if name in common:
            raise checks.invalid(
                name,
                "to be left out of relax_many",
                checks.shown(common[name]),
                "call relax by group",
            )
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    full = []
    if not isinstance(settings, list | tuple) or not all(isinstance(s, Mapping) for s in settings):
        raise checks.invalid("settings", "a list of dicts, one a replica", checks.shown(settings))
    for i, given in enumerate(settings):
        unknown = sorted(given.keys() - {*_PER_REPLICA, *_PER_GROUP})
        replica = {"id": i, **common, **given}
        missing = [name for name in ("start", "lr", "batch_size") if name not in replica]
        if unknown or missing:
            raise checks.invalid(
                f"settings[{i}]",
                "start, lr and batch_size, and maybe others of "
                + ", ".join((*_PER_REPLICA, *_PER_GROUP)),
                f"{', '.join(unknown) or 'nothing'} unknown, {', '.join(missing) or 'nothing'} "
                "missing",
            )
        shared = {name: replica[name] for name in _PER_GROUP if name in replica}
        groups.setdefault(repr(sorted(shared.items())), (shared, []))[1].append(i)
        full.append(replica)
    others = {n: v for n, v in common.items() if n not in {*_PER_REPLICA, *_PER_GROUP}}
    found: dict[int, Trajectory] = {}
    for shared, members in groups.values():
        each = {name: [full[i][name] for i in members] for name in _PER_REPLICA}
        try:
            run = relax(obj, path, each["start"], lr=each["lr"], ids=each["id"], **shared, **others)
        except DivergenceError as error:
            run = error.partial
        found |= {i: run.select([row]) for row, i in enumerate(members)}
    return [found[i] for i in range(len(full))]
