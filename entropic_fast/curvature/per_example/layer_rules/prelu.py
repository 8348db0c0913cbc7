"""`torch.prelu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import Backward, DenseGrad, LayerRule, WeightBiasGrads, at_least_float32
from ._registry import layer_rule


@layer_rule(torch.prelu)
class PReLU(LayerRule):
    """`torch.prelu` with one slope, or one per channel."""

    def __init__(self, input: Tensor, weight: Tensor) -> None:
        self.x, self.weight = input, weight

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.prelu(x, weight)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return torch.where(x > 0, x, self._slopes(x, weight) * x), ()

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient = None
        if at.need_x:
            gradient = torch.where(at.x > 0, at.g, self._slopes(at.x, at.weight) * at.g)
        inputs, gradients = at_least_float32((at.x, at.g))
        # The derivative in the slope is x where x is negative, and 0 elsewhere.
        products = torch.where(inputs > 0, 0, inputs * gradients)
        if at.weight.numel() > 1:
            products = products.movedim(2, 1)
        return gradient, (
            DenseGrad(products.reshape(len(at.x), at.weight.numel(), -1).sum(2)),
            None,
        )

    @staticmethod
    def _slopes(x: Tensor, weight: Tensor | None) -> Tensor:
        """The slopes, along the second axis of an example as in torch."""
        assert weight is not None
        if weight.numel() == 1:
            return weight
        return weight.view(-1, *[1] * (x.ndim - 3))
