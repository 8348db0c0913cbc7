"""The configuration: its common sections, and the base class of all sections.

A figure defines its section in its own module, unless another figure reads it too; `Config` has
all of them once `figures` is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from .._utils import checks

T = TypeVar("T")
S = TypeVar("S", bound="Section")

Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def rejected(expected: str, value: object, do: str = "") -> PydanticCustomError:
    """The error of a validator, which does not know the name of its field."""
    facts = {"expected": expected, "got": checks.shown(value), "do": do}
    return PydanticCustomError("rejected", "{expected}", facts)


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(map(repr, values))) < len(values):
        raise rejected("at least one entry, and none twice", [*values])
    return values


def _some(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise rejected("at least one entry, and none twice", [*values])
    return values


def _position(value: float) -> float:
    if value > 1:
        raise rejected("a position in [0, 1]", value)
    return value


def in_unit_interval(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(value > 1 for value in values):
        raise rejected("positions in [0, 1]", values)
    return values


# For entries that name tasks or curves.
DistinctOrNone = Annotated[tuple[T, ...], AfterValidator(_distinct)]
Distinct = Annotated[tuple[T, ...], AfterValidator(_distinct), AfterValidator(_some)]
Position = Annotated[Number, AfterValidator(_position)]
Positions = Annotated[tuple[Number, ...], AfterValidator(in_unit_interval)]


class Section(BaseModel):
    """A section of a preset's TOML file: fields with ranges and defaults.

    Attributes:
        toml: the section's name in the file.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    toml: ClassVar[str] = ""
    registered: ClassVar[dict[str, type[Section]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Add the section to every configuration built from now on."""
        if cls.toml:
            Section.registered[cls.toml] = cls

    def check(self, config: Config) -> None:
        """Raise ValueError if the section does not fit the others."""

    def images_needed(self) -> dict[str, int]:
        """How many training images the section needs, by key."""
        return {}

    def networks(self) -> list[tuple[str, str]]:
        """Names of networks and data sets that the section adds to those of the run."""
        return []


class Data(Section):
    """Which images, and how many of them for training (0: all) and for curvature."""

    toml = "data"
    name: str = "digits"
    train_limit: Natural = 0
    test_limit: Natural = 0
    curvature_examples: Natural = 512
    norm_examples: Natural = 1024

    def images_needed(self) -> dict[str, int]:
        """Those of curvature and of normalization statistics."""
        return {"curvature_examples": self.curvature_examples, "norm_examples": self.norm_examples}


class Model(Section):
    """The network, by its name in `training.models.build`."""

    toml = "model"
    name: str = "digits-cnn"


def _two_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise rejected("at least two different seeds", seeds)
    return seeds


class Train(Section):
    """Training of the minima, one per seed."""

    toml = "train"
    seeds: Annotated[tuple[Natural, ...], AfterValidator(_two_seeds)] = (0, 1, 2)
    epochs: Count = 200
    lr: Positive = 0.1
    momentum: Momentum = 0.9
    weight_decay: Number = 5e-4
    batch_size: Count = 256
    augment: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False


class PathSection(Section):
    """Minimum energy paths, one per pair of minima and AutoNEB seed.

    `steps` and `lrs` have one entry per cycle.
    """

    toml = "path"
    pairs: Distinct[tuple[Natural, Natural]] = ((0, 1), (0, 2), (1, 2))
    seeds: Distinct[Natural] = (0, 1)
    pivots: Annotated[int, Field(ge=3)] = 9
    max_pivots: Natural = 13
    steps: tuple[Count, ...] = (100, 100, 100, 100)
    lrs: tuple[Positive, ...] = (0.1, 0.03, 0.01, 0.001)
    momentum: Momentum = 0.9
    weight_decay: Number = 5e-4
    batch_size: Count = 256
    dense_points: Annotated[int, Field(ge=2)] = 33

    def check(self, config: Config) -> None:
        """Pairs are of trained minima; cycles and pivots are consistent."""
        seeds = config.train.seeds
        for pair in self.pairs:
            if pair[0] == pair[1] or not set(pair) <= set(seeds):
                expected = f"two different seeds of {seeds}"
                raise checks.invalid("path.pairs", expected, checks.shown(pair))
        if len(self.steps) != len(self.lrs) or not self.steps:
            expected = "as many cycles as path.lrs, at least one"
            raise checks.invalid("path.steps", expected, f"{len(self.steps)} and {len(self.lrs)}")
        if self.max_pivots < self.pivots:
            expected = f"at least path.pivots ({self.pivots})"
            raise checks.invalid("path.max_pivots", expected, str(self.max_pivots))


class StraightLine(Section):
    """Relaxation along the straight line between two branches of figure 5 (figure 8).

    The branches are those of the first trunk's first branching epoch from `epoch` on (-1: the
    last). Without batch sizes there is no such figure.
    """

    toml = "straight_line"
    epoch: Annotated[int, Field(ge=-1)] = -1
    batch_sizes: DistinctOrNone[Count] = ()
    starts: Annotated[Distinct[Number], AfterValidator(in_unit_interval)] = (0.25, 0.5)
    lr: Positive = 0.05
    steps: Count = 1500
    replicas: Count = 16

    def images_needed(self) -> dict[str, int]:
        """The largest minibatch."""
        return {"batch_sizes": max(self.batch_sizes, default=0)}


class Config(BaseModel):
    """Everything that a run's numbers depend on; stored with it as `config.json`.

    `config.train` is a common section, `config[Relax]` that of a figure.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    preset: str
    seed: Natural = 0
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    path: PathSection = PathSection()

    def __getitem__(self, section: type[S]) -> S:
        return cast(S, getattr(self, section.toml))

    def sections(self) -> Iterator[Section]:
        """Every section, in the order of the file."""
        return (value for _, value in self if isinstance(value, Section))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON holds it (tuples as lists)."""
        return self.model_dump(mode="json")

    def __reduce__(self) -> tuple[Any, ...]:  # the class is built, so it has no name to import
        return _rebuilt, (self.to_dict(),)


@cache
def schema() -> type[Config]:
    """`Config` with the sections of all figures."""
    sections = {n: c for n, c in Section.registered.items() if n not in Config.model_fields}
    fields: dict[str, Any] = {name: (cls, cls()) for name, cls in sections.items()}
    return create_model("Config", __base__=Config, **fields)


def _rebuilt(document: dict[str, Any]) -> Config:
    return schema().model_validate(as_tuples(document))


def as_tuples(value: Any) -> Any:
    """A document with its lists as tuples, which the fields of sections are."""
    if isinstance(value, dict):
        return {key: as_tuples(entry) for key, entry in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value
