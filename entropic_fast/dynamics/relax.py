"""Projected SGD: k updates in the full space, then projection on the nearest segment of a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..ops.step import project_step, segment_squares
from ..paths.path import Path
from . import engines
from .minibatches import Minibatches
from .optimizers import Optimizer
from .trajectory import DivergenceError, Record, Trajectory

PerReplica = float | Sequence[float] | Tensor


def relax(
    obj: Objective,
    path: Path,
    start: PerReplica,
    optimizer: str = "sgd",
    *,
    lr: PerReplica,
    batch_size: int,
    project_every: int = 15,
    steps: int,
    replicas: int = 1,
    seed: int = 0,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    ids: Sequence[int] | None = None,
    record_every: int | None = None,
    loss_every: int | None = None,
    max_distance: float = 1.0,
    on_record: Callable[[Record], None] | None = None,
    engine: str = "auto",
) -> Trajectory:
    """Relaxation along a path by projected SGD ("k-SGD"; the paper's figures 3 and 4).

    Each replica starts on the path, makes `project_every` ordinary optimizer updates on
    minibatches in the full space, is put back on the nearest point of the path, and so on. The
    last update is followed by a projection even if its cycle is shorter.

    The optimizer is an ordinary one that knows nothing of the projection: its momentum buffer
    (for Adam both moments, and the count of updates) is kept as it is when the parameters are
    projected. Layers with running statistics use each minibatch's own statistics, as in
    training, whatever `obj.norm` says. Minibatches are epochs of permutations without
    replacement; a replica's minibatches are a function of (seed, its id, step) alone, so it
    does what it would do without the others, up to rounding.

    Args:
        obj: the loss and the data to draw from.
        path: in the parameters of `obj`.
        start: position on the path in [0, 1]; one, or one a replica.
        optimizer: "sgd" (momentum 0), "nesterov" (momentum 0.9) or "adam".
        lr: learning rate; one, or one a replica.
        batch_size: B, at most the number of examples.
        project_every: k, updates between projections.
        steps: updates in all.
        replicas: R; may be left out where `start`, `lr` or `ids` has one entry a replica.
        seed: of the minibatches.
        momentum: of "sgd" or "nesterov"; None for the default.
        weight_decay: L2 coefficient, added to the gradient.
        betas, eps: Adam's.
        ids: whole numbers that name the replicas' noise; default 0 .. R-1. Two replicas with
            one id see the same minibatches.
        record_every: updates between records, a multiple of `project_every`; default, every
            projection. The start and the last update are always recorded.
        loss_every: updates between evaluations of the loss over all examples (batches of
            `obj`, batch statistics), a multiple of `record_every`; None for never.
        max_distance: a replica farther from the path before a projection than so many lengths
            of the path has diverged: the nearest point then says nothing. `math.inf` allows all.
        on_record: called with each `Record`, for progress.
        engine: "auto", or "vmap" or "loop" to force one; see `engines.choose`.

    Returns:
        positions, distances and losses by replica and record. A replica whose loss or
        parameters become NaN or infinite, or that goes too far, is NaN from there on; the
        others continue.

    Raises:
        ValueError: arguments that do not fit one another.
        DivergenceError: every replica diverged.

    >>> from entropic_fast.paths import linear_path
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> obj = Objective(torch.nn.Linear(2, 1, bias=False), "mse", (x, x[:, :1]))
    >>> path = linear_path(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> run = relax(obj, path, 0.2, lr=0.1, batch_size=4, project_every=5, steps=50, replicas=2)
    >>> run.steps[-1].item(), tuple(run.position.shape), bool((run.position[:, -1] > 0.7).all())
    (50, (2, 11), True)
    """
    starts, lrs, names = _replicas(start, lr, ids, replicas)
    _check_path(obj, path)
    checks.whole("steps", steps, 1)
    checks.whole("project_every", project_every, 1)
    record_every = _multiple("record_every", record_every, "project_every", project_every)
    if loss_every is not None:
        _multiple("loss_every", loss_every, "record_every", record_every)
    if not max_distance > 0:
        raise checks.fail("max_distance", "a number above 0, or math.inf", repr(max_distance))
    rule = Optimizer(optimizer, lrs.to(path.pivots.device), momentum, weight_decay, betas, eps)
    obj = obj.with_norm("batch") if obj.has_running_statistics else obj
    run = _Run(
        obj, path, starts, rule, Minibatches(obj, batch_size, seed, names), engine, max_distance
    )

    records: list[tuple[Record, Tensor]] = []
    for step in range(1, steps + 1):
        projects = step % project_every == 0 or step == steps
        products = run.update(step, projects)
        if step == 1:
            records.append(run.record(0, loss_every, on_record))
        if projects:
            run.project(step, products)
            if run.position.numel() == 0:
                first = int(run.diverged_at.argmin())
                raise DivergenceError(
                    f"relax: all {len(names)} replicas diverged; replica {first} (id "
                    f"{names[first]}) at update {int(run.diverged_at[first])} with {optimizer}, "
                    f"lr {float(lrs[first])}; lower lr"
                )
        if step % record_every == 0 or step == steps:
            records.append(run.record(step, loss_every, on_record))

    lost = [r for r in range(len(names)) if run.diverged_at[r] >= 0]
    notes = [
        f"replica {r} (id {names[r]}, lr {float(lrs[r])}) diverged at update "
        f"{int(run.diverged_at[r])} and is NaN from there on"
        for r in lost
    ]
    return Trajectory(
        position=torch.stack([r.position for r, _ in records], 1),
        distance=torch.stack([r.distance for r, _ in records], 1),
        loss=torch.stack([r.loss for r, _ in records], 1),
        full_loss=torch.stack([full for _, full in records], 1),
        steps=torch.tensor([r.step for r, _ in records]),
        lr=lrs,
        ids=torch.tensor(names),
        diverged_at=run.diverged_at,
        optimizer=optimizer,
        batch_size=batch_size,
        project_every=project_every,
        seed=seed,
        engine=run.engine,
        notes=tuple(filter(None, [run.note, *notes])),
    )


class _Run:
    """The state of the replicas that have not diverged; `alive` says which they are."""

    def __init__(
        self,
        obj: Objective,
        path: Path,
        starts: Tensor,
        rule: Optimizer,
        minibatches: Minibatches,
        engine: str,
        max_distance: float,
    ) -> None:
        self.obj, self.path, self.rule, self.minibatches = obj, path, rule, minibatches
        self.max_distance = max_distance * path.length
        self.squares = segment_squares(path.pivots)  # [M - 1]
        self.theta = path.point(starts).contiguous()  # [R, P]
        self.position = starts.to(path.positions)  # [R]
        self.distance = torch.zeros_like(self.position)  # [R]
        self.losses = torch.zeros_like(self.position)  # [R], summed since a record
        self.summed = 0
        self.bad = torch.zeros_like(self.position, dtype=torch.int64)  # [R], first bad update
        self.alive = torch.arange(len(starts))
        self.diverged_at = torch.full_like(self.alive, -1)
        self.engine, self.gradients, self.note = engines.choose(
            engine, obj, self.theta, *minibatches(0)
        )

    def update(self, step: int, projects: bool) -> Tensor:
        """One update of all; the products for projection, if it is next.  # [R, 2, M]"""
        loss, gradient = self.gradients(self.theta, *self.minibatches(step - 1))
        # Noted without waiting for a GPU; acted upon at the next projection.
        self.bad = torch.where((self.bad == 0) & ~torch.isfinite(loss), step, self.bad)
        self.losses += loss
        self.summed += 1
        return self.rule.update(self.theta, gradient, self.path.pivots if projects else None)

    def project(self, step: int, products: Tensor) -> None:
        """Put every replica on the nearest point of the path; drop those that diverged."""
        segment, t, self.distance = project_step(
            self.theta, products, self.path.pivots, self.squares
        )
        here, there = self.path.positions[segment], self.path.positions[segment + 1]
        self.position = torch.lerp(here, there, t)
        # NaN or infinity in theta gives t = NaN, and so a distance that is no less than any.
        self._drop((self.bad > 0) | ~(self.distance <= self.max_distance), step)

    def record(
        self, step: int, loss_every: int | None, on_record: Callable[[Record], None] | None
    ) -> tuple[Record, Tensor]:
        """The record of this moment, and the loss over all examples if it is due."""
        record = Record(
            step, *map(self._spread, (self.position, self.distance, self.losses / self.summed))
        )
        if step > 0:
            self.losses, self.summed = torch.zeros_like(self.losses), 0
        full = torch.full_like(self.position, torch.nan)
        if loss_every is not None and step % loss_every == 0:
            at = self.theta if step > 0 else self.path.point(self.position)
            full = torch.tensor([self.obj.loss(row) for row in at], dtype=torch.float64)
        if on_record is not None:
            on_record(record)
        return record, self._spread(full)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the replicas that are left, among NaN for the others."""
        everyone = torch.full(self.diverged_at.shape, torch.nan, dtype=torch.float64)
        everyone[self.alive] = values.cpu().double()
        return everyone

    def _drop(self, lost: Tensor, step: int) -> None:
        if not bool(lost.any()):
            return
        gone, kept = lost.nonzero()[:, 0], (~lost).nonzero()[:, 0]
        self.diverged_at[self.alive[gone.cpu()]] = torch.where(self.bad > 0, self.bad, step)[
            gone
        ].cpu()
        self.alive = self.alive[kept.cpu()]
        for name in ("theta", "position", "distance", "losses", "bad"):
            setattr(self, name, getattr(self, name)[kept])
        self.rule.keep(kept)
        self.minibatches.keep(kept.tolist())


def _replicas(
    start: PerReplica, lr: PerReplica, ids: Sequence[int] | None, replicas: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Start and learning rate of each replica, float64 [R], and their ids."""
    checks.whole("replicas", replicas, 1)
    values = {"start": _numbers("start", start), "lr": _numbers("lr", lr)}
    lengths = {name: len(v) for name, v in values.items() if v.ndim}
    if ids is not None:
        lengths["ids"] = len(ids)
    if replicas > 1:
        lengths["replicas"] = replicas
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise checks.fail(
            "replicas",
            "one number of replicas, at least 1",
            ", ".join(f"{n} for {k}" for k, n in lengths.items()),
        )
    count = next(iter(lengths.values()), 1)
    starts, lrs = (v.expand(count).clone() for v in values.values())
    if not bool(((starts >= 0) & (starts <= 1)).all()):
        raise checks.fail(
            "start", "positions in [0, 1] (relative arc length)", str(starts.tolist())
        )
    if not bool((torch.isfinite(lrs) & (lrs > 0)).all()):
        raise checks.fail("lr", "finite numbers above 0", str(lrs.tolist()))
    names = list(range(count)) if ids is None else [checks.whole("ids", int(i)) for i in ids]
    return starts, lrs, names


def _numbers(argument: str, value: PerReplica) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise checks.fail(argument, "a number, or one a replica", checks.describe(value)) from error
    if numbers.ndim > 1:
        raise checks.fail(argument, "a number, or one a replica [R]", checks.describe(value))
    return numbers


def _check_path(obj: Objective, path: Path) -> None:
    if not isinstance(obj, Objective):
        raise checks.fail("obj", "an Objective", checks.describe(obj))
    if not isinstance(path, Path):
        raise checks.fail(
            "path",
            "a Path",
            checks.describe(path),
            "build one with Path(pivots) or linear_path(a, b)",
        )
    checks.full_precision("obj", obj.dtype, "a path")
    theta = obj.parameters_vector()
    if path.num_params != obj.num_params:
        raise checks.fail(
            "path",
            f"a path in the objective's {obj.num_params} parameters",
            f"one in {path.num_params}",
            "give the path of this model",
        )
    if path.pivots.dtype != theta.dtype or path.pivots.device != theta.device:
        raise checks.fail(
            "path",
            f"pivots of {theta.dtype} on {theta.device}",
            f"{path.pivots.dtype} on {path.pivots.device}",
            "convert it with path.to(objective.parameters_vector())",
        )


def _multiple(argument: str, value: int | None, of: str, unit: int) -> int:
    if value is None:
        return unit
    if checks.whole(argument, value, 1) % unit:
        raise checks.fail(argument, f"a multiple of {of} ({unit})", str(value))
    return value
