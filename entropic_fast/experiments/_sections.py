"""The sections of a run's configuration, and what each setting means."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataSection:
    """Which images, and how many of them for training (0: all) and for curvature."""

    name: str = "digits"
    train_limit: int = 0
    test_limit: int = 0
    curvature_examples: int = 512
    norm_examples: int = 1024


@dataclass(frozen=True)
class ModelSection:
    """The network, by the name `models.build` knows."""

    name: str = "digits-cnn"


@dataclass(frozen=True)
class TrainSection:
    """Training of the minima: one for each seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 200
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: bool = True
    precision: str = "float32"
    compiled: bool = False


@dataclass(frozen=True)
class PathSection:
    """Minimum energy paths: every pair of minima, once for each AutoNEB seed.

    `steps` and `lrs` give one entry a cycle.
    """

    pairs: tuple[tuple[int, int], ...] = ((0, 1), (0, 2), (1, 2))
    seeds: tuple[int, ...] = (0, 1)
    pivots: int = 9
    max_pivots: int = 13
    steps: tuple[int, ...] = (100, 100, 100, 100)
    lrs: tuple[float, ...] = (0.1, 0.03, 0.01, 0.001)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    dense_points: int = 33


@dataclass(frozen=True)
class CurvatureSection:
    """Curvature along the paths: at every pivot, and spectra at `spectrum_points` positions."""

    probes: int = 16
    tol: float = 1e-2
    spectrum_examples: int = 1024
    spectrum_points: int = 5


@dataclass(frozen=True)
class RelaxSection:
    """Projected SGD on the first path.

    `lr` is the learning rate of figures 3A and 3B; 0 chooses, among `lrs`, the lowest one at
    which the median displacement exceeds its 95 % interval. `optimizer_lr` is that of figure 4
    (0: the same), of which Adam takes `adam_lr_factor`. Figure 3A begins at `starts`, or in the
    middle of every segment of the path, of every `start_every`-th. Figure 3D (ours) projects
    after every number of updates in `cycles`.
    """

    lr: float = 0.02
    batch_size: int = 16
    project_every: int = 15
    steps: int = 4500
    replicas: int = 4
    starts: tuple[float, ...] = ()
    start_every: int = 1
    start: float = 0.0
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    lrs: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    cycles: tuple[int, ...] = ()
    optimizers: tuple[str, ...] = ("sgd", "nesterov", "adam")
    optimizer_lr: float = 0.0
    adam_lr_factor: float = 1.0
    records: int = 100


@dataclass(frozen=True)
class ForceSection:
    """The force on projected SGD along the first path, measured and predicted.

    Bursts of max(cycles) updates from the middles of `positions` segments, `replicas` of them; at
    every other k of `cycles` a third of the updates and a quarter of the replicas.
    The temperature must be low enough for fluctuations to be linear. `examples`: for curvature (0:
    all; the noise is always that of all); `step`: of derivatives along the path, in path lengths.
    """

    positions: int = 6
    lr: float = 0.03
    batch_size: int = 8
    cycles: tuple[int, ...] = (1, 15)
    replicas: int = 128
    directions: int = 8
    rest_examples: int = 8
    spread_draws: int = 1
    examples: int = 0
    step: float = 0.002


@dataclass(frozen=True)
class LMCSection:
    """Linear mode connectivity: branch at epoch k with two data orders, for several k.

    An empty `model` or `data`, and 0 for `epochs` or `batch_size`, stand for those of the minima.
    Without seeds there is no such figure.
    """

    model: str = ""
    data: str = ""
    epochs: int = 0
    batch_size: int = 0
    branch_epochs: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (0,)
    points: int = 11


@dataclass(frozen=True)
class StraightLineSection:
    """Relaxation along the straight line between two branches of figure 5 (figure 8).

    Those of the first trunk's first branching epoch from `epoch` on (-1: the last). Without batch
    sizes there is no such figure.
    """

    epoch: int = -1

    batch_sizes: tuple[int, ...] = ()
    starts: tuple[float, ...] = (0.25, 0.5)
    lr: float = 0.05
    steps: int = 1500
    replicas: int = 16


@dataclass(frozen=True)
class BadMinimumSection:
    """A minimum that fits its examples and generalizes badly, and the path to it (figure 9).

    The last `corrupted_labels` training images, in the data set's order, get wrong labels. A
    network is trained on all images for `epochs`, with neither augmentation nor weight decay. The
    path to it begins at the first minimum; its loss, curvature and dynamics are those on the
    images that kept their labels. With corrupted_labels = 0 there is no such figure.
    """

    corrupted_labels: int = 0
    epochs: int = 200
    batch_size: int = 64
    lr: float = 0.05
    starts: tuple[float, ...] = (0.5, 0.93, 0.99)
    relax_lr: float = 0.1
    relax_batch_size: int = 4
    steps: int = 1500
    replicas: int = 16


@dataclass(frozen=True)
class LangevinSection:
    """Langevin particles in the ring and ridge potentials of figure 1."""

    particles: int = 100_000
    temperature: float = 0.25
    ridge_temperature: float = 0.075
    dt: float = 0.006
    steps: int = 5000


@dataclass(frozen=True)
class Config:
    """Everything a run is computed from; stored with it as `config.json`."""

    preset: str
    seed: int = 0
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    path: PathSection = field(default_factory=PathSection)
    curvature: CurvatureSection = field(default_factory=CurvatureSection)
    relax: RelaxSection = field(default_factory=RelaxSection)
    force: ForceSection = field(default_factory=ForceSection)
    lmc: LMCSection = field(default_factory=LMCSection)
    fig6: LMCSection = field(default_factory=lambda: LMCSection(seeds=()))
    fig7: LMCSection = field(default_factory=lambda: LMCSection(seeds=()))
    straight_line: StraightLineSection = field(default_factory=StraightLineSection)
    bad_minimum: BadMinimumSection = field(default_factory=BadMinimumSection)
    langevin: LangevinSection = field(default_factory=LangevinSection)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON holds it (tuples as lists)."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
