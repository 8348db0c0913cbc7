"""Losses of single examples, by name or as given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from . import checks

LossFunction = Callable[[Tensor, Tensor], Tensor]


def loss_function(loss: str | LossFunction) -> LossFunction:
    """A callable(outputs, targets) -> loss of each example [N].

    Raises:
        ValueError: a name other than "cross_entropy" and "mse"; `nn.CrossEntropyLoss` that
            takes a mean or sum.
    """
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss)
    if callable(loss):
        return loss
    checks.one_of("loss", loss, ("cross_entropy", "mse"))
    return cross_entropy if loss == "cross_entropy" else mean_squared_error


def widened(outputs: Tensor) -> Tensor:
    """Outputs as a loss takes them: half precision, of 2 or 3 digits, in float32.

    >>> import torch
    >>> widened(torch.ones(2, dtype=torch.bfloat16)).dtype, widened(torch.ones(2).double()).dtype
    (torch.float32, torch.float64)
    """
    return outputs.float() if outputs.dtype in checks.HALF else outputs


class OutputHessian(Protocol):
    """Products of the Hessians of single examples' losses in their outputs."""

    def __call__(self, directions: Tensor) -> Tensor:
        """[K, n, ...] for directions [K, n, ...] in the outputs."""


def output_hessian(
    loss: LossFunction, outputs: Tensor, targets: Tensor, weights: Tensor
) -> OutputHessian | None:
    """The Hessian of a weighted sum of losses in closed form; None for other losses.

    For the squared error 2 u / m, m outputs an example; for cross-entropy with probabilities p
    (softmax of the outputs) and s the sum of a position's target weights, s (p u - p <p, u>).

    Args:
        outputs, targets: [n, ...]
        weights: of the examples.  # [n]

    >>> import torch
    >>> H = output_hessian(cross_entropy, torch.zeros(1, 2), torch.tensor([0]), torch.ones(1))
    >>> H(torch.tensor([[[1.0, 0.0]]]))
    tensor([[[ 0.2500, -0.2500]]])
    """
    weights = weights.to(outputs.dtype).view(-1, *[1] * (outputs.ndim - 1))
    if loss is mean_squared_error:
        factor = weights * (2 / max(1, outputs[:1].numel()))
        return lambda directions: directions * factor
    if loss is not cross_entropy and not isinstance(loss, CrossEntropy):
        return None
    mass = target_mass(loss, outputs, targets)
    p = outputs.softmax(1)
    scaled = p * (mass * weights / max(1, outputs[:1, :1].numel()))

    def product(directions: Tensor) -> Tensor:
        inner = (directions * p).sum(2, keepdim=True)
        return (directions - inner).mul_(scaled)

    return product


def target_mass(loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of a position's target weights in a cross-entropy.  # [n, 1, ...] or a number"""
    if isinstance(loss, CrossEntropy):
        return loss.target_mass(outputs, targets)
    return _target_mass(outputs, targets, None)


def _target_mass(outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of a position's target weights: 1 for a class number.  # [n, 1, ...] or a number"""
    if not targets.is_floating_point():
        if weight is None:
            return outputs.new_ones(())
        return weight[targets.clamp(0, len(weight) - 1)].unsqueeze(1)
    if weight is not None:
        targets = targets * weight.view(-1, *[1] * (targets.ndim - 2))
    return targets.sum(1, keepdim=True)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats; a mean over positions for outputs [N, C, ...].  # [N]"""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, a mean over all outputs of an example, as `nn.MSELoss`.  # [N]

    Raises:
        ValueError: targets of another shape than the outputs.
    """
    if outputs.shape != targets.shape:
        raise checks.fail(
            "targets", f"the outputs' shape {list(outputs.shape)}", str(list(targets.shape))
        )
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


class CrossEntropy:
    """`nn.CrossEntropyLoss(..., reduction="none")` as the loss of each example.

    An example's loss is the mean over all its positions, as for "cross_entropy"; an ignored
    position, or an example of an ignored label, counts as 0 and stays in the mean. torch's mean
    divides by the total weight of what is not ignored instead: it, its gradient and its curvature
    are those here times the number of all positions over that weight.

    Args:
        loss: its class weights are converted to the outputs' dtype and device.

    Raises:
        ValueError: a loss that takes a mean or sum itself.

    >>> import torch
    >>> loss = CrossEntropy(nn.CrossEntropyLoss(ignore_index=-100, reduction="none"))
    >>> loss(torch.zeros(2, 3), torch.tensor([-100, 1]))
    tensor([0.0000, 1.0986])
    """

    def __init__(self, loss: nn.CrossEntropyLoss) -> None:
        if loss.reduction != "none":
            raise checks.fail(
                "loss",
                'nn.CrossEntropyLoss with reduction="none"',
                f"reduction={loss.reduction!r}",
                "the objective takes the mean over all examples; an ignored one counts as 0",
            )
        self.ignored, self._smoothing = loss.ignore_index, loss.label_smoothing
        self._weight = None if loss.weight is None else loss.weight.detach().clone()

    def target_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of a position's target weights, 0 where it is ignored.  # [N, 1, ...]"""
        weight = None if self._weight is None else self._weight.to(outputs)
        mass = _target_mass(outputs, targets, weight)
        if self._smoothing:
            total = outputs.shape[1] if weight is None else weight.sum()
            uniform = self._smoothing * total / outputs.shape[1]
            mass = (1 - self._smoothing) * mass + uniform
        if targets.is_floating_point():
            return mass
        return mass * (targets != self.ignored).unsqueeze(1)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs [N, C, ...] for class numbers or probabilities.  # [N]"""
        weight = None if self._weight is None else self._weight.to(outputs)
        losses = functional.cross_entropy(
            outputs,
            targets,
            weight,
            ignore_index=self.ignored,
            reduction="none",
            label_smoothing=self._smoothing,
        )
        return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
