"""Normalization by stored statistics, y = (x - mean) rstd weight + bias per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from ._node import NodeContext


def statistics(ctx: NodeContext, mean: int, var: int, eps: int) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, shaped to broadcast with the input."""
    shape = [1, -1] + [1] * (ctx.value(0).ndim - 2)
    rstd = torch.rsqrt(ctx.value(var) + ctx.argument(eps))
    return ctx.value(mean).view(shape), rstd.view(shape)


def along(vector: Tensor, dims: int) -> Tensor:
    """[C] or [K, C], shaped to broadcast with [n, C, ...] or [K, n, C, ...]."""
    if vector.ndim == 1:
        return vector.view(1, -1, *[1] * (dims - 2))
    return vector.view(len(vector), 1, -1, *[1] * (dims - 2))
