"""`F.linear`, and the product with a matrix on the right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._base import (
    CANCELS,
    Backward,
    FactoredGrad,
    LayerRule,
    WeightBiasGrads,
    at_least_float32,
    bias_grad,
    norms_by_columns,
    packed_bytes,
    position_products,
    squared_norms,
)
from ._registry import layer_rule


class OuterProductGrad(FactoredGrad):
    """dW[o, i] = sum_t G[t, o] A[t, i]: the weight of a linear layer, T positions per example."""

    def __init__(self, a: Tensor, g: Tensor) -> None:  # [n, T, I], [n, T, O]
        self.tensors = (a, g)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> OuterProductGrad:
        return OuterProductGrad(tensors[0], tensors[1])

    @property
    def width(self) -> int:
        a, g = self.tensors
        return a.shape[2] * g.shape[2]

    @property
    def groups(self) -> int:
        return self.tensors[1].shape[2]

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        a, g = self.tensors
        block = g[:, :, begin:end]
        view = out.view(len(a), end - begin, a.shape[2])
        if a.shape[1] == 1:
            torch.mul(block.transpose(1, 2), a, out=view)
        elif view.is_contiguous():
            torch.bmm(block.transpose(1, 2), a, out=view)
        else:
            view.copy_(torch.bmm(block.transpose(1, 2), a))

    def norms(self) -> Tensor:
        a, g = self.tensors
        positions, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
        if positions == 1:
            # |g a^T|^2 = |g|^2 |a|^2.
            return squared_norms(a[:, 0]) * squared_norms(g[:, 0])
        # Two small Gram matrices take T^2 (I + O) operations, the rows T I O.
        if positions * (inputs + outputs) < inputs * outputs:
            both = torch.bmm(a, a.transpose(1, 2)).double()
            both *= torch.bmm(g, g.transpose(1, 2))
            norms = both.sum((1, 2))
            canceled = (norms < CANCELS * both.diagonal(dim1=1, dim2=2).sum(1)).nonzero()[:, 0]
            if len(canceled):
                norms[canceled] = norms_by_columns(OuterProductGrad(a[canceled], g[canceled]))
            return norms
        return norms_by_columns(self)

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        a, g = self.tensors
        positions, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
        # A pair of examples takes T^2 (I + O) float64 operations here, which count double, and I O
        # from rows, whose T I O operations per example are shared by all pairs.
        if 2 * positions**2 * (inputs + outputs) >= inputs * outputs:
            return None
        return packed_bytes(positions, max(inputs, outputs)), 16 * positions**2 + 16

    def inner_products(self, other: FactoredGrad) -> Tensor:
        (a, g), (b, h) = self.tensors, other.tensors
        both = position_products(a, b)
        both *= position_products(g, h)
        return both.view(len(a), a.shape[1], len(b), b.shape[1]).sum((1, 3))


@layer_rule(functional.linear)
class Linear(LayerRule):
    """`F.linear`, with any number of axes before the last."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.x, self.weight, self.bias = input, weight, bias

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.linear(x, weight, bias)

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient = at.g @ at.weight if at.need_x else None
        n = len(at.x)
        a, g = at_least_float32((at.x, at.g))
        # All axes between example and features are positions.
        a, g = a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1])
        return gradient, (
            OuterProductGrad(a, g) if at.wanted[0] else None,
            bias_grad(g, at.wanted[1]),
        )

    def without_bias(self) -> LayerRule | None:
        assert self.weight is not None
        return None if self.bias is None else type(self)(self.x, self.weight)

    def is_small(self) -> bool:
        assert self.weight is not None
        # Then rows for every example take less memory than copies of the weight under vmap.
        positions = self.x.numel() // max(1, self.x.shape[-1])
        return positions * sum(self.weight.shape) <= self.weight.numel()

    def transposed_of(self, weight: Tensor) -> LayerRule:
        return RightProduct(self.x, weight, self.bias)


class RightProduct(Linear):
    """`x @ W + b` with W [inputs, outputs], as in Hugging Face's `Conv1D`."""

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.linear(x, weight.t(), bias)

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient, (grad, bias) = super().backward(at._replace(weight=at.weight.t()))
        if isinstance(grad, OuterProductGrad):
            # dW is the transpose of that of the linear layer.
            grad = OuterProductGrad(*reversed(grad.tensors))
        return gradient, (grad, bias)

    def transposed_of(self, weight: Tensor) -> LayerRule:
        return Linear(self.x, weight, self.bias)
