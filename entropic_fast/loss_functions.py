"""Losses of single examples, by name or as given."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from . import checks

LossFunction = Callable[[Tensor, Tensor], Tensor]


def loss_function(loss: str | LossFunction) -> LossFunction:
    """A callable(outputs, targets) -> loss of each example [N].

    Raises:
        ValueError: a name other than "cross_entropy" and "mse".
    """
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
