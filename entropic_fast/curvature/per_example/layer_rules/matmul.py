"""Matrix products with a parameter, outside of `F.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import Backward, LayerRule, WeightBiasGrads, at_least_float32
from ._registry import layer_rule
from .linear import Linear, OuterProductGrad, RightProduct


class LeftProduct(LayerRule):
    """`W @ x` with W [outputs, inputs] and x [..., inputs, positions]."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.x, self.weight = x, weight

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.matmul(weight, x)

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient = at.weight.t() @ at.g if at.need_x else None
        if not at.wanted[0]:
            return gradient, (None, None)
        n = len(at.x)
        # Features come before positions here, and last in a linear layer.
        a, g = (t.transpose(-1, -2) for t in at_least_float32((at.x, at.g)))
        grad = OuterProductGrad(a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1]))
        return gradient, (grad, None)


@layer_rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.mv, Tensor.mv)
def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> LayerRule | None:
    """A product in which one factor is the same matrix for all examples."""
    if out is not None:
        return None
    if _is_shared_matrix(other) and input.ndim >= 1:
        return RightProduct(input, other)
    if _is_shared_matrix(input) and other.ndim >= 1:
        # W @ x of a vector is a linear layer without positions.
        return Linear(other, input) if other.ndim == 1 else LeftProduct(input, other)
    return None


@layer_rule(torch.addmm, Tensor.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1,
    out: Tensor | None = None,
) -> LayerRule | None:  # fmt: skip
    """`input + mat1 @ mat2`, with a vector as input and the same mat2 for all examples."""
    plain = beta == 1 and alpha == 1 and out is None
    if not plain or not _is_shared_matrix(mat2) or input.shape != mat2.shape[1:]:
        return None
    return RightProduct(mat1, mat2, input)


def _is_shared_matrix(tensor: Tensor) -> bool:
    # A matrix that vmap has batched is not the same for all examples.
    return tensor.ndim == 2 and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
