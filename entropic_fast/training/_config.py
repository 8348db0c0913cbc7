"""Settings of training, its state, and the figures of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from .._utils.checks import at_least, boolean, integer, invalid, numbers, one_of, positive, shown
from .._utils.table import Table


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; the defaults are the paper's.

    Args:
        lr: learning rate at the start.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 coefficient, on every parameter.
        batch_size: examples per update; the last batch of an epoch may be shorter.
        epochs: passes over the data.
        milestones: shares of `epochs` after which the learning rate falls, ascending in (0, 1).
        gamma: factor of each fall, in (0, 1].
        nesterov: Nesterov's form of momentum.
        augment: random crops and flips (`entropic_fast.training.data.augment`).
        pad: pixels of padding of the crops.
        flip: whether augmentation flips.
        precision: "float32", or "bfloat16" for activations (autocast); weights, their updates and
            the loss stay in float32, and so does all curvature.
        compiled: whether full batches use `torch.compile`, which takes a minute once, needs a
            compiler and rounds differently.

    Raises:
        ValueError: a value outside its range.

    >>> TrainConfig(epochs=200).epochs
    200
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    epochs: int = 200
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8, 0.9)
    gamma: float = 0.2
    nesterov: bool = False
    augment: bool = True
    pad: int = 4
    flip: bool = True
    precision: str = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        positive("lr", self.lr)
        if at_least("momentum", self.momentum, 0) >= 1:
            raise invalid("momentum", "a number in [0, 1)", shown(self.momentum))
        at_least("weight_decay", self.weight_decay, 0)
        integer("batch_size", self.batch_size, 1)
        integer("epochs", self.epochs)
        object.__setattr__(self, "milestones", tuple(numbers("milestones", self.milestones)))
        boolean("nesterov", self.nesterov)
        if list(self.milestones) != sorted(self.milestones) or not all(
            0 < m < 1 for m in self.milestones
        ):
            raise invalid(
                "milestones", "ascending shares of training in (0, 1)", shown(self.milestones)
            )
        if positive("gamma", self.gamma) > 1:
            raise invalid("gamma", "a number in (0, 1]", shown(self.gamma))
        if self.nesterov and self.momentum == 0:
            raise invalid("nesterov", "a momentum above 0", "momentum 0")
        integer("pad", self.pad)
        one_of("precision", self.precision, ("float32", "bfloat16"))


class EpochRecord(NamedTuple):
    """What `on_epoch` receives: epochs done, epochs in all, and the epoch's figures.

    Loss and accuracy are means over the epoch's updates (batch statistics, augmented images),
    weighted by batch size.
    """

    epoch: int
    epochs: int
    lr: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrainState:
    """Where training continues, from the weights that a model has.

    Args:
        epoch: epochs done; the first to run.
        optimizer_state: momentum buffers to start from, by parameter name; empty for none.

    Raises:
        ValueError: an epoch below 0.

    >>> TrainState().epoch
    0
    """

    epoch: int = 0
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        integer("epoch", self.epoch)


@dataclass(frozen=True)
class Trained:
    """A model after training, with the state to continue from.

    Attributes:
        model: the model given, trained in place, in evaluation mode.
        epoch: epochs done since the start of training.
        optimizer_state: momentum buffer of each parameter, by name.
        history: one row per epoch of this call (columns of `EpochRecord`).
    """

    model: nn.Module
    epoch: int
    optimizer_state: dict[str, Tensor]
    history: Table

    @property
    def state(self) -> TrainState:
        """The argument `resume` of `train`, to continue."""
        return TrainState(self.epoch, self.optimizer_state)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch: lr x gamma^(milestones passed).

    >>> [round(learning_rate(TrainConfig(), e), 6) for e in (0, 59, 60, 120, 160, 180)]
    [0.1, 0.1, 0.02, 0.004, 0.0008, 0.00016]
    """
    # 0.7 x 10 is 7.000000000000001 in floating point: epoch 7 has passed it.
    passed = sum(epoch >= m * config.epochs - 1e-9 for m in config.milestones)
    return config.lr * config.gamma**passed
