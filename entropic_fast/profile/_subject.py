"""What is measured of a model of the user's own: its loss, one point or two, how closely."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._utils import checks, trees
from ..objective import Objective
from ..paths import AutoNEBConfig, annealed

EXAMPLES = 512  # for curvature, unless told otherwise
BATCH_SIZE = 8  # of the relaxation, unless told otherwise
PATH_BATCH_SIZE = 256


@dataclass(frozen=True)
class ProfileSettings:
    """What `profile_model` measures, and how closely.

    Args:
        examples: the first so many examples for curvature; None for 512, or all if fewer.
        points: along the path, evenly spaced, both ends counted.
        probes: random signs for the Hessian's trace.
        tol: relative residual of eigenvalues.
        eigenvalues: how many of the largest at a point; the smallest is found too.
        density_probes, density_steps: of the spectral density.
        pivots: of the path at first; AutoNEB adds up to half as many.
        path_steps: updates of the path, in four cycles.
        path_lr: learning rate of the first cycle; that of the last is a twentieth.
        weight_decay: c of the term c |theta|^2 / 2 that the path descends besides the loss.
        replicas: of the relaxation, at each of three starts.
        steps: updates of a replica.
        lr: their learning rate.
        batch_size: of their minibatches; None for 8, or all examples if fewer.
        seed: of everything random.

    Raises:
        ValueError: a value out of its range.

    >>> ProfileSettings(points=5).points
    5
    """

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
        for name in ("eigenvalues", "density_probes", "density_steps", "steps"):
            least[name] = 1
        for name, minimum in least.items():
            checks.integer(name, getattr(self, name), minimum)
        for name in ("examples", "batch_size"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        for name in ("tol", "path_lr", "lr"):
            checks.positive(name, getattr(self, name))
        checks.at_least("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Attributes:
        whole: the loss over all data, at the first point.
        some: the same over the examples that curvature is of.
        end: the second point; None for no path.  # [P]
        settings: how closely.
        alone: why there is nothing of single examples (Fisher matrix); "" if there is.
    """

    whole: Objective
    some: Objective
    end: Tensor | None
    settings: ProfileSettings
    alone: str = ""

    @classmethod
    def of(cls, whole: Objective, end: Tensor | None, settings: ProfileSettings) -> Subject:
        """A subject whose settings fit its data.

        Raises:
            ValueError: more examples or larger batches than there are; for a path, data that
                cannot be drawn from at random; a model in half precision.
        """
        checks.single_or_double("model", whole.dtype, "second derivatives and paths")
        count, asked = whole.num_examples, settings.examples
        if asked is not None and asked > count:
            raise checks.invalid("examples", f"at most the {count} there are", str(asked))
        if settings.batch_size is not None and settings.batch_size > count:
            raise checks.invalid(
                "batch_size", f"at most the {count} examples", str(settings.batch_size)
            )
        if end is not None:
            _require_one_shape(whole)
        some = _first(whole, min(asked or EXAMPLES, count))
        try:
            some.require_single_examples()
        except ValueError as error:
            return cls(whole, some, end, settings, str(error))
        return cls(whole, some, end, settings)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the points at which spectra are taken."""
        return ("point",) if self.end is None else ("A", "between", "B")

    @property
    def batch_size(self) -> int:
        """Of the relaxation."""
        return self.settings.batch_size or min(BATCH_SIZE, self.whole.num_examples)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Of each point."""
        fisher = () if self.alone else ("fisher_trace",)
        return ("loss", *fisher, "hessian_trace", "top_eigenvalue", "norm")

    @property
    def neb(self) -> AutoNEBConfig:
        """How the path is found."""
        s = self.settings
        return AutoNEBConfig(
            pivots=s.pivots,
            max_pivots=s.pivots + s.pivots // 2,
            cycles=annealed(4, s.path_steps // 4, s.path_lr, s.path_lr / 20),
            batch_size=min(PATH_BATCH_SIZE, self.whole.num_examples),
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
