"""Settings of projected SGD, checked at construction, and checks of the arguments of `relax`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ...objective import Objective, require_objective
from ...paths import Path
from ._minibatches import Augmentation
from ._records import Record

PerReplica = float | Sequence[float] | Tensor
OPTIMIZERS = ("sgd", "nesterov", "adam")
BACKENDS = ("auto", "vmap", "threads", "loop")
_CHECKPOINT_CYCLES = 100


@dataclass(frozen=True)
class ProjectedSGD:
    """An optimizer on minibatches, projected onto a path every k updates.

    Args:
        lr: learning rate, or one per replica.
        batch_size: B; the number of examples itself for no noise.
        project_every: k, updates between projections.
        steps: updates in all; the last is followed by a projection.
        optimizer: "sgd", "nesterov" or "adam".
        momentum: of "sgd" (default 0) or "nesterov" (default 0.9).
        weight_decay: L2 coefficient, added to the gradient; 0 for an objective that has its own.
        betas, eps: Adam's.
        augment: random changes of the inputs: a function of inputs [n, ...] and random words [n, 4]
            (int64, uniform in [0, 2^32)), such as `training.data.CropAndFlip`. The words are a
            function of (seed, replica, epoch, example).
        max_distance: in path lengths; a replica farther from the path before a projection has
            diverged, because the nearest point is then meaningless. `math.inf` for no limit.

    Raises:
        ValueError: values out of range, or that do not fit the optimizer.

    >>> ProjectedSGD(0.1, 8, optimizer="nesterov").momentum
    0.9
    >>> ProjectedSGD(0.1, 8).replace(project_every=1).project_every
    1
    """

    lr: float | Sequence[float]
    batch_size: int
    project_every: int = 15
    steps: int = 15
    optimizer: str = "sgd"
    momentum: float = None  # type: ignore[assignment]  # resolved at construction
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    augment: Augmentation | None = None
    max_distance: float = 1.0

    def __post_init__(self) -> None:
        rates = numbers("lr", self.lr)
        if not bool((torch.isfinite(rates) & (rates > 0)).all()):
            raise checks.invalid("lr", "finite numbers above 0", checks.shown(self.lr))
        object.__setattr__(self, "lr", tuple(rates.tolist()) if rates.ndim else float(rates))
        for name in ("batch_size", "project_every", "steps"):
            checks.integer(name, getattr(self, name), 1)
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.at_least("weight_decay", self.weight_decay, 0.0)
        checks.positive("eps", self.eps)
        pair = checks.numbers("betas", self.betas)
        if len(pair) != 2 or not all(0 <= b < 1 for b in pair):
            raise checks.invalid("betas", "two numbers in [0, 1)", checks.shown(self.betas))
        object.__setattr__(self, "betas", tuple(pair))
        checks.functions(augment=self.augment)
        if not (isinstance(self.max_distance, int | float) and self.max_distance > 0):
            raise checks.invalid(
                "max_distance", "a number above 0, or math.inf", checks.shown(self.max_distance)
            )
        object.__setattr__(self, "momentum", self._momentum())

    def _momentum(self) -> float:
        nesterov = self.optimizer == "nesterov"
        if self.momentum is None:
            return 0.9 if nesterov else 0.0
        checks.share("momentum", self.momentum)
        if self.optimizer == "adam" and self.momentum:
            raise checks.invalid(
                "momentum",
                'None with optimizer="adam"',
                checks.shown(self.momentum),
                "set betas instead",
            )
        if nesterov and self.momentum == 0:
            raise checks.invalid(
                "momentum", "a number above 0 for Nesterov", checks.shown(self.momentum)
            )
        return float(self.momentum)

    @property
    def rate(self) -> float:
        """The learning rate, where all replicas have the same.

        Raises:
            ValueError: one learning rate per replica.
        """
        if isinstance(self.lr, Sequence):
            raise checks.invalid("lr", "one learning rate", checks.shown(self.lr))
        return self.lr

    @property
    def effective_time(self) -> float:
        """Updates times learning rate."""
        return self.steps * self.rate

    def replace(self, **changes: Any) -> ProjectedSGD:
        """The same settings but for `changes`."""
        return dataclasses.replace(self, **changes)

    def fingerprint(self) -> dict[str, Any]:
        """JSON values of all that a trajectory depends on, except learning rates and its length."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["lr"], values["steps"]
        name = getattr(self.augment, "__qualname__", None) or repr(self.augment)
        if " at 0x" in name:  # an address is another in every process
            name = type(self.augment).__qualname__
        return {**values, "augment": name, "max_distance": repr(self.max_distance)}


@dataclass(frozen=True)
class Recording:
    """What is recorded of a run, how often and where.

    Args:
        every: updates between records, a multiple of `project_every`; default, every projection.
            The start and the last update are always recorded.
        loss_every: updates between losses over all examples, a multiple of `every`; None for never.
        datasets: other data to evaluate the loss on, by name: (inputs, targets), or other data that
            `Objective` accepts.
        datasets_every: updates between these evaluations, a multiple of `every`; default, every
            record.
        to: a CSV file (with a `.json` manifest) that records are appended to. Memory then holds
            only the first and the last record; `Trajectory.load` reads all. An existing file is
            overwritten, unless the run is resumed.
        callback: called with each new `Record`.
    """

    every: int | None = None
    loss_every: int | None = None
    datasets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    datasets_every: int | None = None
    to: str | os.PathLike[str] | None = None
    callback: Callable[[Record], None] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "loss_every", "datasets_every"):
            if getattr(self, name) is not None:
                checks.integer(f"recording.{name}", getattr(self, name), 1)
        if not isinstance(self.datasets, Mapping) or not all(
            isinstance(name, str) and name.isidentifier() for name in self.datasets
        ):
            raise checks.invalid(
                "recording.datasets",
                "data by name, as {'test': (inputs, targets)}",
                checks.shown(self.datasets),
            )
        if self.to is not None:
            checks.file_name("recording.to", self.to)
        checks.functions(callback=self.callback)

    def resolved(self, project_every: int) -> Recording:
        """With defaults filled in, and checked to be multiples of one another."""
        every = _multiple("recording.every", self.every, "project_every", project_every)
        if self.loss_every is not None:
            _multiple("recording.loss_every", self.loss_every, "every", every)
        datasets_every = _multiple("recording.datasets_every", self.datasets_every, "every", every)
        return dataclasses.replace(self, every=every, datasets_every=datasets_every)

    def fingerprint(self) -> dict[str, Any]:
        """JSON values of all that records depend on, except the data."""
        return {
            "record_every": self.every,
            "loss_every": self.loss_every,
            "datasets_every": self.datasets_every,
            "record_to": None if self.to is None else File(self.to).name,
        }


@dataclass(frozen=True)
class Checkpointing:
    """A file from which a killed run continues.

    The result is that of the uninterrupted run, bit for bit on a CPU with as many threads. Delete
    the file to start again.

    Args:
        path: the file; it is replaced atomically.
        every: updates between checkpoints, a multiple of `project_every`; default, 100 projections.
    """

    path: str | os.PathLike[str]
    every: int | None = None

    def __post_init__(self) -> None:
        checks.file_name("path", self.path)
        if self.every is not None:
            checks.integer("checkpoint.every", self.every, 1)

    def interval(self, project_every: int) -> int:
        """Updates between checkpoints."""
        every = _CHECKPOINT_CYCLES * project_every if self.every is None else self.every
        return _multiple("checkpoint.every", every, "project_every", project_every)


@dataclass(frozen=True)
class Execution:
    """How a run is computed.

    Args:
        backend: of the gradients: "auto", or "vmap", "threads" or "loop" to force one. Under "vmap"
            values that the model reads from outside its parameters, inputs and targets stay those
            of the first update.
        cuda_graphs: on a GPU, launch entire cycles as CUDA graphs where that works.
        precision: of the float32 products in the updates' gradients, on a GPU: "float32", or "tf32"
            (10 bits of mantissa, relative errors of 1e-3 in a gradient). Losses at recorded points
            are always in full float32.
    """

    backend: str = "auto"
    cuda_graphs: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        checks.one_of("backend", self.backend, BACKENDS)
        checks.boolean("cuda_graphs", self.cuda_graphs)
        checks.one_of("precision", self.precision, ("float32", "tf32"))


@dataclass(frozen=True, eq=False)
class Arguments:
    """The checked arguments of one call of `relax`, per replica where they may differ."""

    obj: Objective
    path: Path
    starts: Tensor  # [R]
    sgd: ProjectedSGD
    lrs: Tensor  # [R]
    ids: list[int]
    seed: int
    recording: Recording  # with its defaults resolved
    checkpoint: Checkpointing | None
    execution: Execution

    def fingerprint(self) -> dict[str, Any]:
        """JSON values of all that the records depend on, except the data and the path."""
        return {
            **self.sgd.fingerprint(),
            **self.recording.fingerprint(),
            "lr": self.lrs.tolist(),
            "start": self.starts.tolist(),
            "replicas": self.ids,
            "seed": self.seed,
            "backend": self.execution.backend,
            "precision": self.execution.precision,
        }


def require_settings(sgd: object, recording: object, execution: object) -> None:
    checks.instance("sgd", sgd, ProjectedSGD, "as ProjectedSGD(lr=0.1, batch_size=8, steps=150)")
    checks.instance("recording", recording, Recording)
    checks.instance("execution", execution, Execution)


def per_replica(
    start: PerReplica,
    lr: float | Sequence[float],
    replicas: int | Sequence[int],
    name: str = "start",
) -> tuple[Tensor, Tensor, list[int]]:
    """Start and learning rate of each replica, float64 [R], and the ids of their noise."""
    starts, lrs = numbers(name, start), numbers("lr", lr)
    lengths = {key: len(v) for key, v in ((name, starts), ("lr", lrs)) if v.ndim}
    ids = None
    if isinstance(replicas, Iterable) and not isinstance(replicas, str):
        ids = _integers("replicas", replicas)
        lengths["replicas"] = len(ids)
    elif checks.integer("replicas", replicas, 1) > 1:
        lengths["replicas"] = int(replicas)
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise checks.invalid(
            "replicas",
            "one number of replicas, at least 1",
            ", ".join(f"{n} for {k}" for k, n in lengths.items()),
        )
    count = next(iter(lengths.values()), 1)
    if not bool(((starts >= 0) & (starts <= 1)).all()):
        raise checks.invalid(name, "positions in [0, 1] (relative arc length)", checks.shown(start))
    names = list(range(count)) if ids is None else ids
    return starts.expand(count).clone(), lrs.expand(count).clone(), names


def _integers(argument: str, values: Iterable[int]) -> list[int]:
    floats = checks.numbers(argument, values)
    if not all(math.isfinite(number) and number == int(number) for number in floats):
        raise checks.invalid(argument, "integers", checks.shown(values))
    return [checks.integer(argument, int(number)) for number in floats]


def numbers(argument: str, value: PerReplica) -> Tensor:
    """A number [] or one per replica [R], float64 on the CPU."""
    try:
        values = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise checks.invalid(
            argument, "a number, or one per replica", checks.describe(value)
        ) from error
    if values.ndim > 1:
        raise checks.invalid(argument, "a number, or one per replica [R]", checks.describe(value))
    return values


def check_path(obj: Objective, path: Path) -> None:
    """Reject a path that is not in the objective's parameters."""
    require_objective(obj)
    if not isinstance(path, Path):
        raise checks.invalid(
            "path",
            "a Path",
            checks.describe(path),
            "build one with Path(pivots) or linear_path(a, b)",
        )
    checks.single_or_double("obj", obj.dtype, "a path")
    theta = obj.parameters_vector()
    if path.num_params != obj.num_params:
        raise checks.invalid(
            "path",
            f"a path in the objective's {obj.num_params} parameters",
            f"one in {path.num_params}",
            "give the path of this model",
        )
    if path.pivots.dtype != theta.dtype or path.pivots.device != theta.device:
        raise checks.invalid(
            "path",
            f"pivots of {theta.dtype} on {theta.device}",
            f"{path.pivots.dtype} on {path.pivots.device}",
            "convert it with path.to(objective.parameters_vector())",
        )


def _multiple(argument: str, value: int | None, of: str, unit: int) -> int:
    if value is None:
        return unit
    if checks.integer(argument, value, 1) % unit:
        raise checks.invalid(argument, f"a multiple of {of} ({unit})", str(value))
    return value
