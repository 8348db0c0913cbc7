"""Projected SGD: k updates in the full space, then projection on the nearest segment of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from ..._torch.full_precision import products_in
from ..._utils import checks, trees
from ..._utils.convergence import DivergenceError
from ...objective import Objective
from ...objective._objective import require_objective
from ...paths._path import Path
from . import _gradient_backends as engines
from ._checkpoint import Checkpoint, fingerprint
from ._cuda_graph import GraphedCycles
from ._distributed import over_processes
from ._evaluation import Evaluation
from ._minibatches import Augmentation, Minibatches
from ._optimizers import Optimizer
from ._records import InMemory, Records, ToFile
from ._replica_state import ReplicaState
from ._settings import PerReplica, check_path, multiple
from ._settings import replicas as per_replica
from ._trajectory import Record, Trajectory

CHECKPOINT_CYCLES = 100  # between checkpoints, unless told otherwise


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
    augment: Augmentation | None = None,
    record_every: int | None = None,
    loss_every: int | None = None,
    fixed_sets: Mapping[str, Any] | None = None,
    fixed_every: int | None = None,
    record_to: str | File | None = None,
    checkpoint: str | File | None = None,
    checkpoint_every: int | None = None,
    max_distance: float = 1.0,
    on_record: Callable[[Record], None] | None = None,
    engine: str = "auto",
    cuda_graphs: bool = True,
    precision: str = "float32",
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
    does what it would do without the others, up to rounding. Each minibatch's gradient is an
    unbiased estimate of the full gradient: where torch's loss is a mean over what counts, it is
    divided by what counts in the entire data, not in the minibatch (`loss_reductions`).

    Two controls show the entropic force by its absence: `batch_size` = N is full-batch descent
    (all examples in a fixed order, no noise), and with `project_every=1` the fast directions
    never fluctuate.

    Args:
        obj: the loss and the data to draw from.
        path: in the parameters of `obj`.
        start: position on the path in [0, 1]; one, or one a replica.
        optimizer: "sgd" (momentum 0), "nesterov" (momentum 0.9) or "adam".
        lr: learning rate; one, or one a replica. For replicas that differ in batch size or
            optimizer see `relax_many`.
        batch_size: B, at most the number of examples; that number itself for no noise.
        project_every: k, updates between projections.
        steps: updates in all.
        replicas: R; may be left out where `start`, `lr` or `ids` has one entry a replica.
        seed: of the minibatches.
        momentum: of "sgd" or "nesterov"; None for the default.
        weight_decay: L2 coefficient, added to the gradient; 0 for an objective with weight decay
            of its own, whose gradient and losses have it already.
        betas, eps: Adam's.
        ids: integers that name the replicas' noise; default 0 .. R-1. Two replicas with
            one id see the same minibatches.
        augment: random changes of every minibatch's inputs, within the cycle: a function of
            inputs [n, ...] and random words [n, 4] (see `Minibatches`), such as
            `data.CropAndFlip` or `ImageData.augmentation()`. None for none.
        record_every: updates between records, a multiple of `project_every`; default, every
            projection. The start and the last update are always recorded.
        loss_every: updates between evaluations of the loss over all examples (batches of
            `obj`, batch statistics), a multiple of `record_every`; None for never.
        fixed_sets: other examples to evaluate the loss on, by name: (inputs, targets) or
            whatever else `Objective` takes as data.
        fixed_every: updates between their evaluations, a multiple of `record_every`; default,
            every record.
        record_to: a CSV file (and a `.json` beside it) that records are appended to as they are
            made. They are then not kept in memory: the trajectory returned has the first and
            the last alone, and `Trajectory.load(record_to)` reads them all. A file there from
            before is overwritten, unless the run is resumed.
        checkpoint: a file that the state of the run is written to, whole or not at all. If it is
            there, the run goes on from it, and what it returns is what it would have been
            unbroken: bit for bit on a CPU with as many threads. Delete it to begin anew.
        checkpoint_every: updates between checkpoints, a multiple of `project_every`; default,
            100 projections.
        max_distance: a replica farther from the path before a projection than so many lengths
            of the path has diverged: the nearest point then says nothing. `math.inf` allows all.
        on_record: called with each `Record`, for progress; not again for those resumed.
        engine: "auto", or "vmap", "threads" or "loop" to force one; see `engines.choose`. The model
            and its loss must be functions of parameters, inputs and targets alone: what they
            read from elsewhere "vmap" takes as it was at the first update (`dynamics.traced`).
        cuda_graphs: on a GPU, launch whole cycles as CUDA graphs where that works.
        precision: of the float32 products in the updates' gradients, on a GPU: "float32", or
            "tf32", whose products keep 10 bits of mantissa (relative errors of 1e-3 in a
            gradient, less than the noise of most minibatches, though the same at every visit of
            a point). By its data sheet a GPU with TF32 is several times quicker in it; not
            measured here, so the default is "float32". Losses that are recorded at points
            (`loss_every`, `fixed_sets`) are in full float32 always.

    Returns:
        positions, distances and losses by replica and record. A replica whose loss or
        parameters become NaN or infinite, or that goes too far, is NaN from there on; the
        others continue.

    Raises:
        ValueError: arguments that do not fit one another.
        CheckpointMismatchError: a checkpoint of other settings, data or path.
        DivergenceError: every replica diverged.

    >>> from entropic_fast.paths import linear_path
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> obj = Objective(torch.nn.Linear(2, 1, bias=False), "mse", (x, x[:, :1]))
    >>> path = linear_path(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> run = relax(obj, path, 0.2, lr=0.1, batch_size=4, project_every=5, steps=50, replicas=2)
    >>> run.steps[-1].item(), tuple(run.position.shape), bool((run.position[:, -1] > 0.7).all())
    (50, (2, 11), True)
    """
    require_objective(obj)
    given = dict(locals())
    starts, lrs, names = per_replica(start, lr, ids, replicas)
    check_path(obj, path)
    if obj.communicator.size > 1:
        return over_processes(relax, given, starts, lrs, names)
    checks.one_of("precision", precision, ("float32", "tf32"))
    checks.functions(augment=augment, on_record=on_record)
    checks.boolean("cuda_graphs", cuda_graphs)
    checks.one_of("engine", engine, engines.ENGINES)
    for argument, file in (("record_to", record_to), ("checkpoint", checkpoint)):
        if file is not None:
            checks.file_name(argument, file)
    checks.at_least("weight_decay", weight_decay, 0)
    checks.integer("steps", steps, 1)
    checks.integer("project_every", project_every, 1)
    record_every = multiple("record_every", record_every, "project_every", project_every)
    if loss_every is not None:
        multiple("loss_every", loss_every, "record_every", record_every)
    fixed_every = multiple("fixed_every", fixed_every, "record_every", record_every)
    if checkpoint_every is None:
        checkpoint_every = CHECKPOINT_CYCLES * project_every
    multiple("checkpoint_every", checkpoint_every, "project_every", project_every)
    if not (isinstance(max_distance, int | float) and max_distance > 0):
        raise checks.invalid(
            "max_distance", "a number above 0, or math.inf", checks.shown(max_distance)
        )
    if weight_decay and obj.weight_decay:
        raise checks.invalid(
            "weight_decay",
            "0 for an objective with weight decay of its own",
            f"{weight_decay} beside {obj.weight_decay}",
            "pass one of the two",
        )
    rule = Optimizer(optimizer, lrs.to(path.pivots.device), momentum, weight_decay, betas, eps)
    obj = obj.with_norm("batch") if obj.has_running_statistics else obj
    evaluation = Evaluation(obj, {} if fixed_sets is None else fixed_sets, loss_every, fixed_every)
    minibatches = Minibatches(obj, batch_size, seed, names, augment)

    saved, stored = None, None
    if checkpoint is not None:
        settings = {
            **dict(lr=lrs.tolist(), start=starts.tolist(), ids=names, seed=seed),
            **dict(optimizer=optimizer, batch_size=batch_size, project_every=project_every),
            **dict(momentum=rule.momentum, weight_decay=weight_decay, betas=betas, eps=eps),
            **dict(record_every=record_every, loss_every=loss_every, fixed_every=fixed_every),
            **dict(engine=engine, max_distance=repr(max_distance)),
            "record_to": record_to and File(record_to).name,
            "fixed_sets": {
                n: fingerprint(*trees.leaves(o.tensors())) for n, o in evaluation.fixed.items()
            },
            "path": fingerprint(path.pivots),
            "data": fingerprint(*trees.leaves(obj.tensors())),
            "model": fingerprint(*obj.frozen_tensors()),
            "loss": obj.loss_name,
            "augment": _named(augment),
        }
        if obj.weight_decay:
            settings["objective_weight_decay"] = obj.weight_decay
        if precision != "float32":  # which checkpoints without the setting are of
            settings["precision"] = precision
        saved = Checkpoint(checkpoint, settings)
        stored = saved.load()
        if stored is not None and engine == "auto":  # which may depend on the number of threads
            engine = engines.ENGINES[int(stored["engine"])]

    theta = path.point(starts).contiguous()
    engine, gradients, note = engines.choose(engine, obj, theta, *minibatches(0))
    about: dict[str, Any] = dict(optimizer=optimizer, batch_size=batch_size, seed=seed)
    about |= dict(project_every=project_every, engine=engine)
    records: Records = InMemory()
    if record_to is not None:
        records = ToFile(record_to, starts, lrs, names, about, list(evaluation.fixed))
    run = ReplicaState(path, starts, rule, minibatches, gradients, max_distance)
    cycles = GraphedCycles(run, project_every, cuda_graphs)

    def emit(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    try:
        if stored is not None:
            run.restore(stored)
            records.restore(stored)
            if run.step > steps:
                raise checks.invalid("steps", f"at least the checkpoint's {run.step}", str(steps))
        while run.step < steps and len(run.alive):
            first = run.step == 0
            with products_in(precision):
                cycles(min(project_every, steps - run.step))
            if first:
                emit(run.first_record(starts, evaluation))
            if run.step % record_every == 0 or run.step == steps or not len(run.alive):
                emit(run.record(evaluation))
            # Not after the last cycle: more steps may be asked for, and it may be a shorter one.
            if saved is not None and run.step % checkpoint_every == 0 and run.step < steps:
                mark = {"engine": torch.tensor(engines.ENGINES.index(engine))}
                saved.save(run.state() | records.state() | mark)
        about["engine"] += "+graphs" if cycles.captured else ""
        about["notes"] = [n for n in (note, cycles.note) if n] + _lost(run.diverged_at, names, lrs)
        records.close(about)
    finally:
        records.close()
        engines.close(gradients)
    trajectory = _trajectory(records.kept(), lrs, names, about, record_to)
    if not len(run.alive):
        first_lost = int(run.diverged_at.argmin())
        raise DivergenceError(
            f"relax: all {len(names)} replicas diverged; replica {first_lost} (id "
            f"{names[first_lost]}) at update {int(run.diverged_at[first_lost])} with {optimizer}, "
            f"lr {float(lrs[first_lost])}; lower lr",
            trajectory,
        )
    return trajectory


def _named(augment: Augmentation | None) -> str:
    """What a checkpoint knows an augmentation by: no address in memory."""
    name = getattr(augment, "__qualname__", None) or repr(augment)
    return type(augment).__qualname__ if " at 0x" in name else name


def _lost(diverged_at: Tensor, names: Sequence[int], lrs: Tensor) -> list[str]:
    return [
        f"replica {r} (id {names[r]}, lr {float(lrs[r])}) diverged at update {at} and is NaN "
        "from there on"
        for r, at in enumerate(diverged_at.tolist())
        if at >= 0
    ]


def _trajectory(
    records: list[Record],
    lrs: Tensor,
    names: Sequence[int],
    about: dict[str, Any],
    file: str | File | None,
) -> Trajectory:
    if file is not None:
        where = f"the start and the last record; Trajectory.load({str(file)!r}) reads all"
        about = {**about, "notes": [*about["notes"], where]}
    parts: dict[str, Any] = {
        name: torch.stack([getattr(r, name) for r in records], 1)
        for name in ("position", "distance", "loss", "full_loss")
    }
    parts["fixed_losses"] = {
        name: torch.stack([r.fixed_losses[name] for r in records], 1)
        for name in records[0].fixed_losses
    }
    return Trajectory(
        **parts,
        steps=torch.tensor([r.step for r in records]),
        lr=lrs,
        ids=torch.tensor(names),
        diverged_at=records[-1].diverged_at,
        **{**about, "notes": tuple(about["notes"])},
    )
