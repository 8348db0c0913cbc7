"""Normalization by stored statistics, y = (x - mean) rstd weight + bias per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._jvp_rules import jvp_rule
from ._node import NodeContext

aten = torch.ops.aten


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


@jvp_rule(aten.native_batch_norm.default)
def _batch_norm(ctx: NodeContext) -> Any:
    tx, tw, tb = (ctx.tangent(i) for i in range(3))
    x, weight, dims = ctx.value(0), ctx.value(1), ctx.value(0).ndim
    mean, rstd = statistics(ctx, 3, 4, 7)
    out = None
    if tx is not None:
        out = tx * (rstd if weight is None else rstd * along(weight, dims))
    if tw is not None:
        term = ((x - mean) * rstd) * along(tw, dims)
        out = term if out is None else out.add_(term)
    if tb is not None:
        term = along(tb, dims)
        out = term.expand(len(tb), *x.shape) if out is None else out.add_(term)
    return out, None, None


@jvp_rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(ctx: NodeContext) -> Any:
    tg, tx, tw = (ctx.tangent(i) for i in range(3))
    g, x, weight, dims = ctx.value(0), ctx.value(1), ctx.value(2), ctx.value(0).ndim
    mean, rstd = statistics(ctx, 3, 4, 8)
    sums = [1, *range(3, dims + 1)]
    gx = gw = gb = None
    if tg is not None:
        # rstd and weight have C entries: their product first saves a pass over K tangents.
        gx = tg * (rstd if weight is None else rstd * along(weight, dims))
        gw = (tg * ((x - mean) * rstd)).sum(sums)
        gb = tg.sum(sums)
    if tw is not None:
        term = (g * rstd) * along(tw, dims)
        gx = term if gx is None else gx.add_(term)
    if tx is not None:
        term = (tx * (g * rstd)).sum(sums)
        gw = term if gw is None else gw.add_(term)
    return gx, gw, gb


def backward(ctx: NodeContext) -> Any:
    """The values of aten's backward pass that the graph reads."""
    g, x, weight, dims = ctx.value(0), ctx.value(1), ctx.value(2), ctx.value(0).ndim
    mean, rstd = statistics(ctx, 3, 4, 8)
    # aten's own kernel (2.13 and 2.15, CPU) is wrong for one image with channels last.
    sums = [0, *range(2, dims)]
    gx = g * (rstd if weight is None else rstd * along(weight, dims))
    gw = (g * ((x - mean) * rstd)).sum(sums) if ctx.wanted(1) else None
    gb = g.sum(sums) if ctx.wanted(2) else None
    return gx, gw, gb
