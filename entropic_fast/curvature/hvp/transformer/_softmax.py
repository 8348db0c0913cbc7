"""Tangents of softmax and of its backward pass, and its second-order term, in closed form.

With p = softmax(x) and sums along its dimension, dx = p (x' - sum(p x')), and the backward pass
is gx = p (g - sum(p g)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._jvp_rules import jvp_rule
from .._node import NodeContext

aten = torch.ops.aten


@jvp_rule(aten._softmax.default, aten._safe_softmax.default)
def _softmax(ctx: NodeContext) -> Any:
    return centered(ctx.value(ctx.node), ctx.tangent(0), _dim(ctx, 1))


@jvp_rule(aten._softmax_backward_data.default)
def _softmax_backward(ctx: NodeContext) -> Any:
    tg, tp = ctx.tangent(0), ctx.tangent(1)
    p, dim = ctx.value(1), _dim(ctx, 2)
    out = None if tg is None else centered(p, tg, dim)
    if tp is not None:
        g = ctx.value(0)
        # p' (g - sum(p g)) - p sum(p' g)
        mean = (p * g).sum(dim, keepdim=True)
        weighted = tp * (g - mean)
        # sum(p') is 0 in exact arithmetic, so the mean may stay inside the sum.
        weighted.addcmul_(p, weighted.sum(dim, keepdim=True), value=-1)
        out = weighted if out is None else out.add_(weighted)
    return out


def centered(p: Tensor, t: Tensor, dim: int) -> Tensor:
    """p (t - sum(p t)) for [K, ...] tangents t."""
    product = t * p
    return product.addcmul_(p, product.sum(dim, keepdim=True), value=-1)


def second_order(ctx: NodeContext, g: Tensor) -> Tensor:
    """sum of p (g - sum(p g)) (x' - sum(p x'))^2 in float64, [K]."""
    p, t, dim = ctx.value(ctx.node), ctx.tangent(0), _dim(ctx, 1)
    weight = p * (g - (p * g).sum(dim, keepdim=True))
    spread = t - (t * p).sum(dim, keepdim=True)
    return (spread.square_().mul_(weight)).reshape(len(t), -1).sum(1, dtype=torch.float64)


def _dim(ctx: NodeContext, position: int) -> int:
    """The dimension of softmax, from the end, as it counts with or without K."""
    rank = len(ctx.shape)
    return int(ctx.argument(position)) % rank - rank
