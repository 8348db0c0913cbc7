"""Settings of a model report, and the model, data and points that it measures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._utils import checks, trees
from ..objective import Objective
from ..objective.losses import LossFunction
from ..paths import AutoNEBConfig, annealed

EXAMPLES = 512  # for curvature, by default
BATCH_SIZE = 8  # of the relaxation, by default
PATH_BATCH_SIZE = 256


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of `profile_model`: the loss, what is measured, and how accurately.

    Args:
        loss: as for `Objective`. A callable is known by its name when resumed.
        norm: normalization by running statistics ("running"), or each batch's ("batch").
        output: output tensor that the loss reads, by name or index; default logits, or the only
            one.
        examples: examples for curvature, the first ones; default 512, or all if fewer.
        points: points along the path, evenly spaced, both ends counted.
        probes: Rademacher probes per trace.
        tol: relative residual of eigenvalues.
        eigenvalues: largest eigenvalues at a point; the smallest is computed too.
        density_probes: probes of the spectral density, the most expensive stage.
        density_steps: Lanczos steps per probe of the density.
        pivots: pivots of the path at first; AutoNEB adds up to half as many.
        path_steps: updates of the path, in four cycles.
        path_lr: learning rate of the path's first cycle; that of the last is a twentieth.
        weight_decay: weight decay c of the path, which descends the loss + c |theta|^2 / 2.
        replicas: replicas of the relaxation at each of three starts.
        steps: updates per replica.
        lr: learning rate of the relaxation.
        batch_size: minibatch size of the relaxation; default 8, or all examples if fewer.
        seed: seed of everything random.

    Raises:
        ValueError: a value outside its range.

    >>> ProfileSettings(points=5).points
    5
    """

    loss: str | LossFunction = "cross_entropy"
    norm: str = "running"
    output: str | int | None = None
    examples: int | None = None
    points: int = 9
    probes: int = 32
    tol: float = 1e-2
    eigenvalues: int = 5
    density_probes: int = 8
    density_steps: int = 60
    pivots: int = 9
    path_steps: int = 240
    path_lr: float = 0.05
    weight_decay: float = 5e-4
    replicas: int = 8
    steps: int = 600
    lr: float = 0.05
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"points": 3, "probes": 2, "pivots": 3, "path_steps": 4, "replicas": 2, "seed": 0}
        least |= dict.fromkeys(("eigenvalues", "density_probes", "density_steps", "steps"), 1)
        least |= {n: 1 for n in ("examples", "batch_size") if getattr(self, n) is not None}
        for name, minimum in least.items():
            checks.integer(name, getattr(self, name), minimum)
        for name in ("tol", "path_lr", "lr"):
            checks.positive(name, getattr(self, name))
        checks.at_least("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True, eq=False)
class Subject:
    """The loss and the points that a report measures."""

    full: Objective  # over all data, at the first point
    subset: Objective  # over the examples used for curvature
    end: Tensor | None  # [P], the second point; None for no path
    settings: ProfileSettings
    no_scores: str = ""  # why there are no per-example gradients

    @classmethod
    def of(cls, full: Objective, end: Tensor | None, settings: ProfileSettings) -> Subject:
        """A subject whose settings fit its data.

        Raises:
            ValueError: more examples or larger batches than there are; for a path, data that
                cannot be drawn from at random; a model in half precision.
        """
        checks.single_or_double("model", full.dtype, "second derivatives and paths")
        count, asked = full.num_examples, settings.examples
        if asked is not None and asked > count:
            raise checks.invalid("examples", f"at most the {count} there are", str(asked))
        if settings.batch_size is not None and settings.batch_size > count:
            raise checks.invalid(
                "batch_size", f"at most the {count} examples", str(settings.batch_size)
            )
        if end is not None:
            _require_one_shape(full)
        subset = _first(full, min(asked or EXAMPLES, count))
        try:
            subset.require_single_examples()
        except ValueError as error:
            return cls(full, subset, end, settings, str(error))
        return cls(full, subset, end, settings)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the points at which spectra are computed."""
        return ("point",) if self.end is None else ("A", "between", "B")

    @property
    def batch_size(self) -> int:
        """Minibatch size of the relaxation."""
        return self.settings.batch_size or min(BATCH_SIZE, self.full.num_examples)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Quantities measured at each point."""
        fisher = () if self.no_scores else ("fisher_trace",)
        return ("loss", *fisher, "hessian_trace", "top_eigenvalue", "norm")

    @property
    def neb(self) -> AutoNEBConfig:
        """Settings of AutoNEB for the path."""
        s = self.settings
        return AutoNEBConfig(
            pivots=s.pivots,
            max_pivots=s.pivots + s.pivots // 2,
            cycles=annealed(4, s.path_steps // 4, s.path_lr, s.path_lr / 20),
            batch_size=min(PATH_BATCH_SIZE, self.full.num_examples),
            weight_decay=s.weight_decay,
            eval_points=3,
            seed=s.seed,
        )


def _first(obj: Objective, count: int) -> Objective:
    """The objective over its first `count` examples, in batches as they came."""
    if count == obj.num_examples:
        return obj
    if not obj.examples.are_tensors:
        return obj.with_data([(b.inputs, b.targets) for b in obj.batches(count)])
    return obj.sampled(*obj.tensors(count), batch_size=obj.examples.batch_size)


def _require_one_shape(obj: Objective) -> None:
    shapes = {trees.example_form(b[1:]): checks.describe(b.inputs) for b in obj.batches()}
    if len(shapes) > 1:
        raise checks.invalid(
            "data",
            "examples of one shape, to draw minibatches from for a path",
            f"{len(shapes)} shapes, as " + " and ".join(list(shapes.values())[:2]),
            "pad them, or give one point only",
        )
