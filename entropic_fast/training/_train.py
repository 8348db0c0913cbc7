"""Training by the paper's recipe, and evaluation.

SGD with momentum 0.9, weight decay 5e-4, learning rate 0.1, batches of 256, 200 epochs, learning
rate divided by 5 at 30, 60, 80 and 90 % of training (as reported in secondary notes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch.memory_format import preferred_memory_format
from .._utils.checks import HALF, integer, invalid
from .._utils.convergence import DivergenceError
from .._utils.devices import is_gpu
from .._utils.table import Table
from ._config import EpochRecord, TrainConfig, Trained, TrainState, learning_rate
from .data import ImageData, augment, batches
from .models import initialize as initialize_model


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    seed: int,
    order_seed: int | None = None,
    resume: TrainState | None = None,
    stop_epoch: int | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Trained:
    """Train `model` in place by a recipe, up to `stop_epoch`.

    A run that stops at any epoch and resumes with its `Trained.state` equals the uninterrupted run.
    To branch (linear mode connectivity), resume copies of one model from one state with different
    `order_seed`s.

    Args:
        model: on the data's device.
        data: the training set.
        config: the recipe; its schedule always spans all of `config.epochs`.
        seed: of the initial weights.
        order_seed: of the data order and augmentation; default `seed`.
        resume: continue from the model's weights and this state; None draws initial weights from
            `seed` and starts at epoch 0.
        stop_epoch: the last epoch, exclusive; default `config.epochs`.
        on_epoch: called after each epoch.

    Raises:
        ValueError: epochs outside the recipe, another device, outputs that do not fit the classes,
            an optimizer state of another model.
        DivergenceError: a loss or weights that are NaN or infinite.

    >>> from entropic_fast.training.data import load
    >>> from entropic_fast.training.models import build
    >>> data, _ = load("digits", limit=50)
    >>> config = TrainConfig(epochs=2, augment=False)
    >>> train(build("digits-cnn"), data, config, seed=0).epoch
    2
    """
    stop = config.epochs if stop_epoch is None else integer("stop_epoch", stop_epoch)
    if stop > config.epochs:
        raise invalid("stop_epoch", f"at most {config.epochs}, the recipe's epochs", str(stop))
    state = resume or TrainState()
    if state.epoch > stop:
        raise invalid("resume.epoch", f"at most stop_epoch, {stop}", str(state.epoch))
    integer("seed", seed)
    _check_device(model, data)
    _check_precision(model)
    if resume is None:
        initialize_model(model, seed)
    _check_classes(model, data)
    order = seed if order_seed is None else integer("order_seed", order_seed)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    records = []
    model.eval()  # the trial of a layout moves no statistics
    _lay_out(model, torch.channels_last)
    try:
        layout = preferred_memory_format(model, data.inputs(slice(2)))
        _lay_out(model, layout)
        model.train()
        optimizer = _optimizer(named, config, state.optimizer_state)
        fast = torch.compile(model, dynamic=False) if config.compiled else model
        for epoch in range(state.epoch, stop):
            record = _epoch(model, fast, data, config, optimizer, epoch, order, layout)
            records.append(record._asdict())
            if on_epoch is not None:
                on_epoch(record)
    finally:
        _lay_out(model, torch.contiguous_format)
        model.eval()
    if stop > state.epoch and not all(bool(torch.isfinite(p).all()) for p in named.values()):
        raise _diverged(
            "weights that are NaN or infinite", stop - 1, None, learning_rate(config, stop - 1)
        )
    return Trained(model, stop, _momentum(named, optimizer), Table.from_rows(records))


def _epoch(
    model: nn.Module,
    fast: Callable[[Tensor], Tensor],
    data: ImageData,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    order_seed: int,
    layout: torch.memory_format,
) -> EpochRecord:
    lr, half = learning_rate(config, epoch), config.precision == "bfloat16"
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses, correct, sizes = [], torch.zeros((), dtype=torch.int64, device=data.device), []
    for index in batches(len(data), config.batch_size, epoch, order_seed, data.device):
        images = data.images[index]
        if config.augment:
            images = augment(images, index, epoch, order_seed, config.pad, config.flip)
        targets = data.labels[index]
        images = data.normalize(images).contiguous(memory_format=layout)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            # A last batch of another size would be compiled for itself.
            outputs = (fast if len(index) == config.batch_size else model)(images)
        loss = functional.cross_entropy(outputs.float() if half else outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
        correct += (outputs.detach().argmax(1) == targets).sum()
        sizes.append(len(index))
    # Read once per epoch: reading every loss would make a GPU wait for each update.
    values = torch.stack(losses).double().cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        update = int(bad[0])
        raise _diverged(f"loss {float(values[update])}", epoch, update, lr)
    mean = float(values @ torch.tensor(sizes, dtype=torch.float64)) / len(data)
    return EpochRecord(epoch + 1, config.epochs, lr, mean, int(correct) / len(data))


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Convert the weights to another layout, unless some share memory, which would end that.

    Channels last is 5 to 35 % faster for the networks of `models`, on one core.
    """
    weights = {id(p): p for p in model.parameters()}.values()
    if len({p.untyped_storage().data_ptr() for p in weights}) == len(weights):
        model.to(memory_format=layout)


def _diverged(what: str, epoch: int, update: int | None, lr: float) -> DivergenceError:
    where = f"epoch {epoch}" + ("" if update is None else f", update {update} of that epoch")
    return DivergenceError(
        f"training: expected finite values, got {what} in {where}, at learning rate {lr:g}; "
        "lower lr, or raise batch_size, and start again"
    )


def _optimizer(
    named: Mapping[str, nn.Parameter], config: TrainConfig, state: Mapping[str, Tensor]
) -> torch.optim.SGD:
    if not named:
        raise invalid("model", "at least one parameter that requires a gradient", "none")
    device = next(iter(named.values())).device.type
    # Fused updates take a third of the time of foreach on a small network (CPU).
    optimizer = torch.optim.SGD(
        named.values(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=device == "cpu" or is_gpu(device),
    )
    if not state:
        return optimizer
    if set(state) != set(named):
        different = sorted(set(state) ^ set(named))
        raise invalid(
            "optimizer_state",
            "one momentum buffer per parameter of the model",
            f"{len(different)} that differ, as {different[0]!r}",
            "resume from the state that train() returned for this model",
        )
    for name, parameter in named.items():
        if state[name].shape != parameter.shape:
            raise invalid(
                f"optimizer_state[{name!r}]",
                f"shape {list(parameter.shape)}",
                str(list(state[name].shape)),
            )
        # A copy, as branches that share a state must not move each other's momentum; in the
        # weight's layout, as the fused update on a CPU follows memory order.
        buffer = torch.empty_like(parameter, requires_grad=False).copy_(state[name])
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return optimizer


def _momentum(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    buffers = {name: optimizer.state[p].get("momentum_buffer") for name, p in named.items()}
    return {n: b.detach().contiguous().clone() for n, b in buffers.items() if b is not None}


def _check_device(model: nn.Module, data: ImageData) -> None:
    devices = {p.device for p in model.parameters()}
    if devices - {data.device}:
        raise invalid(
            "model",
            f"parameters on the data's device, {data.device}",
            ", ".join(sorted(map(str, devices))),
            "call model.to(...) or data.to(...)",
        )


def _check_precision(model: nn.Module) -> None:
    half = {p.dtype for p in model.parameters()} & set(HALF)
    if half:
        raise invalid(
            "model",
            "float32 parameters, to which small updates can be added",
            ", ".join(sorted(str(d).removeprefix("torch.") for d in half)),
            "train model.float()",
        )


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, state in training.items():
            module.training = state


def _check_classes(model: nn.Module, data: ImageData) -> None:
    try:
        with torch.no_grad(), _in_evaluation_mode(model):
            outputs = model(data.inputs(slice(0, 1)))
    except RuntimeError as error:
        raise invalid(
            "model",
            f"a network for images of shape {list(data.images.shape[1:])}",
            str(error).splitlines()[0],
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < data.num_classes:
        got = str(list(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise invalid(
            "model",
            f"outputs of shape [N, at least {data.num_classes}], one a class",
            got,
            f"build it with num_classes={data.num_classes}",
        )


class Evaluation(NamedTuple):
    """Mean cross-entropy (nats per example) and share of correctly classified examples."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageData, batch_size: int = 1024) -> Evaluation:
    """Loss and accuracy over an entire set, in evaluation mode; every example weighs the same.

    Raises:
        ValueError: a loss that is NaN or infinite (the example is named), another device, or
            outputs that do not fit the classes.

    >>> from entropic_fast.training.data import load
    >>> from entropic_fast.training.models import build
    >>> _, test = load("digits")
    >>> 0 <= evaluate(build("digits-cnn"), test).accuracy <= 1
    True
    """
    integer("batch_size", batch_size, 1)
    _check_device(model, data)
    _check_classes(model, data)
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    correct = 0
    with _in_evaluation_mode(model):
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            targets = data.labels[rows]
            outputs = model(data.inputs(rows))
            losses = functional.cross_entropy(outputs, targets, reduction="none")
            bad = (~torch.isfinite(losses)).nonzero()
            if len(bad):
                first = int(bad[0])
                raise invalid(
                    "loss",
                    "a finite loss for every example",
                    f"{float(losses[first])} for example {start + first}",
                    "the weights are not those of a trained model: train again",
                )
            total += losses.double().sum()
            correct += int((outputs.argmax(1) == targets).sum())
    return Evaluation(float(total) / len(data), correct / len(data))
