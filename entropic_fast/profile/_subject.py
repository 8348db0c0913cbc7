"""Settings of a model report, and the model, data and points that it measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .._utils import checks, trees
from ..objective import Objective
from ..objective.losses import NAMES, LossFunction
from ..paths import AutoNEBConfig, annealed

EXAMPLES = 512  # for curvature, by default
BATCH_SIZE = 8  # of the relaxation, by default
PATH_BATCH_SIZE = 256


def _help(text: str) -> dict[str, str]:
    """Metadata of a field: its help as an option of `entropic-fast profile`."""
    return {"help": text}


@dataclass(frozen=True)
class ProfileSettings:
    """Settings of `profile_model`: the loss, what is measured, and how accurately.

    Args:
        loss, norm, output: as for `Objective`. A callable loss is known by its name when resumed.
        examples: the first so many examples for curvature; None for 512, or all if fewer.
        points: along the path, evenly spaced, both ends counted.
        probes: Rademacher probes for the Hessian trace.
        tol: relative residual of eigenvalues.
        eigenvalues: how many of the largest at a point; the smallest is found too.
        density_probes, density_steps: of the spectral density.
        pivots: of the path at first; AutoNEB adds up to half as many.
        path_steps: updates of the path, in four cycles.
        path_lr: learning rate of the first cycle; that of the last is a twentieth.
        weight_decay: c of the term c |theta|^2 / 2 that the path descends besides the loss.
        replicas: of the relaxation, at each of three starts.
        steps: updates per replica.
        lr: learning rate of the relaxation.
        batch_size: of the relaxation; None for 8, or all examples if fewer.
        seed: of everything random.

    Raises:
        ValueError: a value outside its range.

    >>> ProfileSettings(points=5).points
    5
    """

    loss: str | LossFunction = field(
        default="cross_entropy", metadata=_help(f"One of {', '.join(NAMES)}.")
    )
    norm: str = field(
        default="running",
        metadata=_help("Normalization by running statistics, or each batch's: batch."),
    )
    output: str | int | None = field(
        default=None,
        metadata=_help(
            "Output tensor that the loss reads, by name or index; default logits, or the only one."
        ),
    )
    examples: int | None = field(
        default=None, metadata=_help("Examples for curvature; default 512, or all if fewer.")
    )
    points: int = field(default=9, metadata=_help("Points along the path."))
    probes: int = field(default=32, metadata=_help("Rademacher probes per trace."))
    tol: float = field(default=1e-2, metadata=_help("Relative residual of eigenvalues."))
    eigenvalues: int = field(default=5, metadata=_help("Largest eigenvalues at a point."))
    density_probes: int = field(
        default=8, metadata=_help("Probes of the spectral density, the most expensive stage.")
    )
    density_steps: int = field(
        default=60, metadata=_help("Lanczos steps per probe of the density.")
    )
    pivots: int = field(default=9, metadata=_help("Pivots of the path at first."))
    path_steps: int = field(default=240, metadata=_help("Updates of the path."))
    path_lr: float = field(default=0.05, metadata=_help("Learning rate of the path's first cycle."))
    weight_decay: float = field(default=5e-4, metadata=_help("Weight decay of the path."))
    replicas: int = field(default=8, metadata=_help("Replicas of the relaxation at each start."))
    steps: int = field(default=600, metadata=_help("Updates per replica."))
    lr: float = field(default=0.05, metadata=_help("Learning rate of the relaxation."))
    batch_size: int | None = field(
        default=None, metadata=_help("Minibatch size of the relaxation; default 8.")
    )
    seed: int = field(default=0, metadata=_help("Seed of everything random."))

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
