"""Replicas whose settings differ, run in groups of equal settings."""

from __future__ import annotations

from collections.abc import Sequence

from ..._utils import checks
from ..._utils.convergence import DivergenceError
from ...objective import Objective
from ...paths import Path
from ._relax import relax
from ._settings import (
    Execution,
    PerReplica,
    ProjectedSGD,
    Recording,
    check_path,
    numbers,
    per_replica,
)
from ._trajectory import Trajectory


def relax_many(
    obj: Objective,
    path: Path,
    starts: PerReplica,
    settings: Sequence[ProjectedSGD],
    *,
    replicas: Sequence[int] | None = None,
    seed: int = 0,
    recording: Recording = Recording(),
    execution: Execution = Execution(),
) -> list[Trajectory]:
    """`relax` for replicas whose settings differ.

    Replicas that differ only in start, learning rate and id advance together; such groups run in
    turn, each on all cores or the entire GPU. A replica's minibatches depend on its id alone.

    Args:
        obj, path, seed, recording, execution: as in `relax`; groups cannot write one file.
        starts: a position, or one per replica.
        settings: one per replica, each with one learning rate.
        replicas: the ids of their noise; default, their places in the list.

    Returns:
        one trajectory of one replica per entry of `settings`. It is NaN after a divergence, and
        ends early if the entire group diverged.

    Raises:
        ValueError: as `relax`.

    >>> import torch
    >>> from entropic_fast import linear_path
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(4, 1),) * 2)
    >>> path = linear_path(torch.tensor([0.0]), torch.tensor([1.0]))
    >>> settings = [ProjectedSGD(lr, b) for b in (2, 4) for lr in (0.1, 0.2)]
    >>> runs = relax_many(obj, path, 0.5, settings)
    >>> [run.batch_size for run in runs], [run.lr.item() for run in runs]
    ([2, 2, 4, 4], [0.1, 0.2, 0.1, 0.2])
    """
    check_path(obj, path)
    if (
        not isinstance(settings, list | tuple)
        or not settings
        or not all(isinstance(sgd, ProjectedSGD) for sgd in settings)
    ):
        raise checks.invalid(
            "settings", "a list of ProjectedSGD, one per replica", checks.shown(settings)
        )
    checks.instance("recording", recording, Recording)
    if recording.to is not None:
        raise checks.invalid(
            "recording.to",
            "None with relax_many",
            checks.shown(recording.to),
            "call relax by group",
        )
    if numbers("starts", starts).numel() not in (1, len(settings)):
        raise checks.invalid(
            "starts", f"a position, or one for each of {len(settings)}", checks.describe(starts)
        )
    ids = range(len(settings)) if replicas is None else replicas
    positions, rates, ids = per_replica(starts, [sgd.rate for sgd in settings], ids, "starts")
    groups: list[tuple[ProjectedSGD, list[int]]] = []
    for i, sgd in enumerate(settings):
        alike = sgd.replace(lr=1.0)
        members = next((members for common, members in groups if common == alike), None)
        if members is None:
            groups.append((alike, [i]))
        else:
            members.append(i)
    trajectories: dict[int, Trajectory] = {}
    for common, members in groups:
        sgd = common.replace(lr=rates[members].tolist())
        names = [ids[i] for i in members]
        try:
            run = relax(
                obj,
                path,
                positions[members],
                sgd,
                replicas=names,
                seed=seed,
                recording=recording,
                execution=execution,
            )
        except DivergenceError as error:
            run = error.partial
        trajectories |= {i: run.select([row]) for row, i in enumerate(members)}
    return [trajectories[i] for i in range(len(settings))]
