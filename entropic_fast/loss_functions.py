"""Losses of single examples, by name or as given."""

from __future__ import annotations

from collections.abc import Callable

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
