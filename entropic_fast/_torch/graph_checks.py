"""Checks of losses, outputs and autograd graphs that need no Objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._utils import checks, trees
from .derivative_checks import cdist_is_right


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite; the message names the example and the point."""


_CDIST = "CdistBackward0"
# Functions without a second derivative in torch, and what to use instead.
_ONCE = {
    "EmbeddingBagBackward0": (
        "nn.EmbeddingBag",
        "use nn.Embedding, and a sum, mean or maximum over its positions",
    ),
    _CDIST: (
        "torch.cdist",
        "use torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], dim=-1)",
    ),
}


def backward_nodes(tensor: Tensor) -> Iterator[Any]:
    """Functions of the backward pass of a tensor, each once."""
    todo: list[Any] = [tensor.grad_fn]
    seen = {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(before for before, _ in node.next_functions)


def require_twice_differentiable(tensor: Tensor) -> None:
    """Reject a graph with a function marked as `once_differentiable`, or so in torch.

    torch treats its backward pass as a constant where only some inputs are asked for: second
    derivatives would silently lack terms.
    """
    for node in backward_nodes(tensor):
        if node.name() in _ONCE and not (node.name() == _CDIST and cdist_is_right()):
            what, instead = _ONCE[node.name()]
            raise RuntimeError(f"{what}: torch has no second derivative of it; {instead}")
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        code = getattr(backward, "__code__", None)
        if code is not None and code.co_filename == torch.autograd.function.__file__:
            raise RuntimeError(
                f"{node.name()}: a function marked with @once_differentiable has no second "
                "derivative; write its backward pass in differentiable operations"
            )


def require_finite_losses(
    losses: Tensor, theta: Tensor, start: int, inputs: Any = (), targets: Any = ()
) -> None:
    """Reject NaN and infinite losses [n] of the examples from `start` on, at theta [P].

    `inputs` and `targets` are theirs, if known: those that are not finite are named.
    """
    bad = ~torch.isfinite(losses)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        norm = float(torch.linalg.vector_norm(theta.detach(), dtype=torch.float64))
        given = [
            name
            for name, tree in (("inputs", inputs), ("targets", targets))
            if any(not bool(torch.isfinite(t[first]).all()) for t in trees.leaves(tree))
        ]
        advice = "check that example's values, or the learning rate that led here"
        if given:
            advice = f"its {' and '.join(given)} are not finite either: leave the example out"
        raise NonFiniteLossError(
            f"loss: expected finite losses, got {float(losses[first])} for example "
            f"{start + first} at a point of norm {norm:.4g}; {advice}"
        )


def require_real_outputs(outputs: Tensor) -> None:
    """Reject complex outputs, for quantities defined by derivatives of single outputs."""
    if outputs.is_complex():
        raise checks.invalid(
            "outputs",
            "real numbers",
            checks.describe(outputs),
            "return torch.view_as_real of them, and take the loss of those",
        )


def require_finite_outputs(outputs: Tensor, start: int) -> None:
    """Reject complex, NaN and infinite outputs [n, ...] of the examples from `start` on."""
    require_real_outputs(outputs)
    finite = torch.isfinite(outputs.reshape(len(outputs), -1)).all(1)
    if not bool(finite.all()):
        raise checks.invalid(
            "outputs",
            "finite values",
            f"NaN or infinity for example {start + int((~finite).nonzero()[0])}",
            "check that example's values, or the point",
        )


def require_in_range(gradient: Tensor, dtype: torch.dtype) -> None:
    """Reject a sum of gradients of a half-precision `dtype` that overflowed."""
    if dtype in checks.HALF and not bool(torch.isfinite(gradient).all()):
        raise checks.invalid(
            "gradient",
            f"values within {dtype}, at most {torch.finfo(dtype).max:.3g}",
            "NaN or infinity though the losses are finite",
            "use a smaller batch_size, or the model in float32, model.float()",
        )


def require_classifier(outputs: Tensor, targets: Tensor) -> None:
    """Reject outputs and targets that are not class scores [n, C] and integers [n]."""
    if outputs.ndim != 2 or outputs.is_complex() or targets.is_floating_point():
        raise checks.invalid(
            "evaluate",
            "a classifier (outputs [N, C], whole targets [N])",
            f"outputs {list(outputs.shape)}, targets of {targets.dtype}",
        )
