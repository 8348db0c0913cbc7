"""Tangents of operations in K directions at once, [K, *shape].

A JVP rule calls the same operation on stacked tensors. Operations without one use torch's forward
mode (`by_torch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.forward_mode import jvp
from ._node import NodeContext, by_torch
from .transformer._activations import first_derivative

aten = torch.ops.aten
JVPRule = Callable[[NodeContext], Any]
JVP_RULES: dict[Any, JVPRule] = {}


def jvp_rule(*targets: Any) -> Callable[[JVPRule], JVPRule]:
    def register(function: JVPRule) -> JVPRule:
        JVP_RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def tangent(ctx: NodeContext) -> Any:
    """The tangent of an operation, by its JVP rule or by torch's forward mode."""
    target = ctx.node.target
    # A rule is one call on stacked tensors; by torch it is vmap over forward mode.
    if target in JVP_RULES:
        return JVP_RULES[target](ctx)
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise(ctx)
    return by_torch(ctx)


def aligned(tangent: Tensor, dims: int) -> Tensor:
    """[K, 1, ..., 1, *shape], which broadcasts as shape does with `dims` dimensions."""
    missing = dims + 1 - tangent.ndim
    if missing <= 0:
        return tangent
    return tangent.reshape(len(tangent), *[1] * missing, *tangent.shape[1:])


# -- shapes ----------------------------------------------------------------------------------


@jvp_rule(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
def _view(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    return t.reshape(len(t), *ctx.shape)


@jvp_rule(aten.expand.default)
def _expand(ctx: NodeContext) -> Any:
    t = aligned(ctx.tangent(0), len(ctx.shape))
    return t.expand(len(t), *ctx.shape)


@jvp_rule(aten.permute.default)
def _permute(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    return t.permute(0, *(d % (t.ndim - 1) + 1 for d in ctx.argument(1)))


@jvp_rule(aten.t.default)
def _t(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    return t.transpose(-1, -2) if t.ndim > 2 else t


@jvp_rule(aten.transpose.int)
def _transpose(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    rank = t.ndim - 1
    return t.transpose(ctx.argument(1) % rank + 1, ctx.argument(2) % rank + 1)


@jvp_rule(aten.unsqueeze.default)
def _unsqueeze(ctx: NodeContext) -> Any:
    return ctx.tangent(0).unsqueeze(ctx.argument(1) % len(ctx.shape) + 1)


@jvp_rule(aten.select.int)
def _select(ctx: NodeContext) -> Any:
    rank = ctx.value(0).ndim
    return ctx.tangent(0).select(ctx.argument(1) % rank + 1, ctx.argument(2))


@jvp_rule(aten.slice.Tensor)
def _slice(ctx: NodeContext) -> Any:
    dim = ctx.argument(1) % ctx.value(0).ndim + 1
    return aten.slice(ctx.tangent(0), dim, *(ctx.argument(i) for i in (2, 3, 4)))


@jvp_rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(ctx: NodeContext) -> Any:
    base, source = ctx.tangent(0), ctx.tangent(1)
    k = len(source if base is None else base)
    # Zeros for an inactive argument are one expanded element: no memory for K tensors.
    base = ctx.value(0).new_zeros(1).expand(k, *ctx.shape) if base is None else base
    source = ctx.value(1).new_zeros(1).expand(k, *ctx.value(1).shape) if source is None else source
    dim = ctx.argument(2) % len(ctx.shape) + 1
    return ctx.node.target(base, source, dim, *ctx.node.args[3:])


@jvp_rule(aten.cat.default)
def _cat(ctx: NodeContext) -> Any:
    nodes, dim = ctx.argument(0), ctx.argument(1)
    # Inactive tensors are joined as zeros.
    active = next(t for t in (ctx.tangent(a) for a in nodes) if t is not None)
    parts = []
    for node in nodes:
        t = ctx.tangent(node)
        if t is None:
            value = ctx.value(node)
            t = value.new_zeros(1).expand(len(active), *value.shape)
        parts.append(t)
    return torch.cat(parts, dim % len(ctx.shape) + 1)


@jvp_rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(ctx: NodeContext) -> Any:
    return ctx.tangent(0)


@jvp_rule(aten.neg.default)
def _neg(ctx: NodeContext) -> Any:
    return -ctx.tangent(0)


# -- sums ------------------------------------------------------------------------------------


@jvp_rule(aten.sum.default)
def _sum_all(ctx: NodeContext) -> Any:
    return ctx.tangent(0).reshape(len(ctx.tangent(0)), -1).sum(1)


@jvp_rule(aten.mean.default)
def _mean_all(ctx: NodeContext) -> Any:
    return ctx.tangent(0).reshape(len(ctx.tangent(0)), -1).mean(1)


@jvp_rule(aten.sum.dim_IntList, aten.mean.dim)
def _sum(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    rank = t.ndim - 1
    # No dimensions stand for all.
    dims = ctx.argument(1) or range(rank)
    shifted = [d % rank + 1 for d in dims]
    operation = torch.sum if ctx.node.target is aten.sum.dim_IntList else torch.mean
    return operation(t, shifted, bool(ctx.argument(2)))


# -- pointwise -------------------------------------------------------------------------------


@jvp_rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(ctx: NodeContext) -> Any:
    a, b = ctx.tangent(0), ctx.tangent(1)
    sign = -1 if ctx.node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1
    alpha = sign * ctx.argument(2)
    dims = len(ctx.shape)
    if a is not None and b is not None:
        out = torch.add(aligned(a, dims), aligned(b, dims), alpha=alpha)
    elif a is not None:
        out = aligned(a, dims)
    else:
        out = aligned(b, dims) if alpha == 1 else aligned(b, dims) * alpha
    return out.expand(len(out), *ctx.shape)


@jvp_rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(ctx: NodeContext) -> Any:
    a, b, dims = ctx.tangent(0), ctx.tangent(1), len(ctx.shape)
    out = None
    if a is not None:
        out = aligned(a, dims) * ctx.value(1)
    if b is not None:
        second = aligned(b, dims) * ctx.value(0)
        out = second if out is None else out + second
    return out


@jvp_rule(aten.div.Scalar)
def _div(ctx: NodeContext) -> Any:
    return ctx.tangent(0) / ctx.value(1)


@jvp_rule(aten.relu.default)
def _relu(ctx: NodeContext) -> Any:
    # The derivative at 0 is 0, as in torch's backward pass.
    return ctx.tangent(0) * (ctx.value(ctx.node) > 0)


@jvp_rule(aten.threshold_backward.default)
def _threshold_backward(ctx: NodeContext) -> Any:
    t = ctx.tangent(0)
    return None if t is None else t * (ctx.value(1) > ctx.argument(2))


def pointwise(ctx: NodeContext) -> Any:
    """The sum over active arguments of derivative times tangent."""
    out: Tensor | None = None
    for node, derivative in derivatives(ctx).items():
        t = aligned(ctx.tangent(node), len(ctx.shape))
        out = t * derivative if out is None else torch.addcmul(out, t, derivative)
    assert out is not None
    return out.expand(len(out), *ctx.shape)


def derivatives(ctx: NodeContext) -> dict[Any, Tensor]:
    """Derivatives of a pointwise operation in its active arguments, of the result's shape."""
    return {node: ctx.cached(node, lambda node=node: _derivative(ctx, node)) for node in ctx.active}


def _derivative(ctx: NodeContext, node: Any) -> Tensor:
    closed = first_derivative(ctx, node)
    if closed is not None:
        return closed
    point = ctx.point(node)
    # Elementwise, so that the tangent of ones is the derivative itself: once for all K.
    return jvp(lambda a: ctx.call({node: a}), (point,), (torch.ones_like(point),))[1]


# -- products --------------------------------------------------------------------------------


@jvp_rule(aten.mm.default, aten.bmm.default)
def _mm(ctx: NodeContext) -> Any:
    return _bilinear(ctx, 0, 1)


@jvp_rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(ctx: NodeContext) -> Any:
    out = _bilinear(ctx, 1, 2)
    beta, alpha = ctx.argument(3), ctx.argument(4)
    if out is not None and alpha != 1:
        out = out * alpha
    c = ctx.tangent(0)
    if c is not None:
        c = aligned(c, len(ctx.shape))
        c = c if beta == 1 else c * beta
        out = c.expand(len(c), *ctx.shape) if out is None else out + c
    return out


def _bilinear(ctx: NodeContext, i: int, j: int) -> Any:
    a, b = ctx.tangent(i), ctx.tangent(j)
    out = None if a is None else matrix_products(a, ctx.value(j))
    return out if b is None else matrix_products(ctx.value(i), b, out)


def matrix_products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The products of K matrices, or batches of them, with one; added to `out` if given.

    One of a and b has a leading axis K more than the other.
    """
    if a.device.type != "cpu":
        product = torch.matmul(a, b)
        return product if out is None else out.add_(product)
    # `matmul` would copy the one that has no K, and transposed ones; on a CPU K calls cost nothing.
    first = a.ndim > b.ndim
    several = a if first else b
    if first and b.ndim == 2 and out is None and a.is_contiguous():
        return torch.mm(a.view(-1, a.shape[2]), b).view(*a.shape[:2], -1)
    multiply, add = (torch.mm, torch.addmm) if several.ndim == 3 else (torch.bmm, torch.baddbmm)
    fresh = out is None
    if out is None:
        out = several.new_empty(*several.shape[:-2], a.shape[-2], b.shape[-1])
    for k, one in enumerate(several):
        pair = (one, b) if first else (a, one)
        if fresh:
            multiply(*pair, out=out[k])
        else:
            add(out[k], *pair, out=out[k])
    return out


@jvp_rule(aten.embedding.default)
def _embedding(ctx: NodeContext) -> Any:
    # The padding row is a constant: torch gives it no gradient.
    t, tokens, padding = ctx.tangent(0), ctx.value(1), ctx.argument(2)
    out = t[:, tokens]
    if padding >= 0:
        out = out.masked_fill((tokens == padding)[..., None], 0)
    return out
