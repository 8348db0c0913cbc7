"""Second-order terms <g, D^2 f[a'_k, a'_k]> of operations f, for each of K directions.

g is the cotangent of the result and a' the tangents of the arguments. See "Quadratic forms" in
docs/design/hvp.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.forward_mode import jvp
from ...ops.norm_act_tangents import inner_products
from ._convolution import Geometry, InputGradient, _blocks
from ._fusion import pixels, spread_pixels
from ._jvp_rules import aligned, matrix_products
from ._node import NodeContext, second_order_by_torch
from ._patches import by_patches
from .transformer import _softmax as softmax
from .transformer._activations import second_derivative

aten = torch.ops.aten
SecondOrderRule = Callable[[NodeContext, Tensor], Tensor | None]
SECOND_ORDER_RULES: dict[Any, SecondOrderRule] = {}


def second_order_term(ctx: NodeContext, cotangents: dict[int, Tensor]) -> Tensor | None:
    """The term of an operation that is not linear, in float64 [K]; None for zero."""
    target = ctx.node.target
    if target in SECOND_ORDER_RULES:
        return SECOND_ORDER_RULES[target](ctx, cotangents[0])
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return _pointwise(ctx, cotangents[0])
    return second_order_by_torch(ctx, cotangents)


def second_order_rule(*targets: Any) -> Callable[[SecondOrderRule], SecondOrderRule]:
    def register(function: SecondOrderRule) -> SecondOrderRule:
        SECOND_ORDER_RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, in float64 [K], of [K, *shape] with [K, *shape] or [*shape]."""
    if a.ndim == 5 and b.ndim == 5:  # images, of which a product would be a copy of K tangents
        return inner_products(pixels(a), spread_pixels(b))
    k, columns = len(a), a.shape[-1] if a.ndim > 1 else 1
    if a.numel() == 0 or a.dtype not in (torch.float32, torch.float64):
        return (a * b).reshape(k, -1).sum(1, dtype=torch.float64)
    rows = b.reshape(k if b.ndim == a.ndim else 1, -1, columns).expand(k, -1, -1)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    return inner_products(a.reshape(k, -1, columns).contiguous(), rows)


@second_order_rule(aten.convolution.default)
def _convolution(ctx: NodeContext, g: Tensor) -> Tensor | None:
    tx, tw = ctx.tangent(0), ctx.tangent(1)
    if tx is None or tw is None:
        return None
    geometry, x = Geometry.of(ctx, 3), ctx.value(0)
    patches = by_patches(ctx, 0, 1, geometry)
    if patches is not None:
        return 2 * inner(patches.tangent_patches(tx), patches.mixed_products(g, tw))
    # <g, conv(x', W')> = <x', conv^T(g, W')>: one map to the input for K weights.
    back = InputGradient(geometry, g, x, tw.shape[3:])
    forms = [inner(tx[rows], back.with_weights(g, tw[rows])) for rows in _blocks(tw, x.shape[1])]
    return 2 * (forms[0] if len(forms) == 1 else torch.cat(forms))


@second_order_rule(aten.mm.default, aten.bmm.default)
def _mm(ctx: NodeContext, g: Tensor) -> Tensor | None:
    return _product(ctx, 0, 1, g)


@second_order_rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(ctx: NodeContext, g: Tensor) -> Tensor | None:
    term = _product(ctx, 1, 2, g)
    return None if term is None else term * ctx.argument(4)


def _product(ctx: NodeContext, i: int, j: int, g: Tensor) -> Tensor | None:
    a, b = ctx.tangent(i), ctx.tangent(j)
    if a is None or b is None:
        return None
    return 2 * inner(a, matrix_products(g, b.transpose(-1, -2)))


@second_order_rule(aten._softmax.default, aten._safe_softmax.default)
def _softmax(ctx: NodeContext, g: Tensor) -> Tensor | None:
    return softmax.second_order(ctx, g)


@second_order_rule(aten.mul.Tensor)
def _mul(ctx: NodeContext, g: Tensor) -> Tensor | None:
    a, b = ctx.tangent(0), ctx.tangent(1)
    if a is None or b is None:
        return None
    # D^2 (a b)[(a', b'), (a', b')] = 2 a' b', as for every bilinear operation here.
    dims = g.ndim
    return 2 * inner(aligned(a, dims) * aligned(b, dims), g)


def _pointwise(ctx: NodeContext, g: Tensor) -> Tensor | None:
    """The sum over pairs of active arguments of their mixed second derivatives."""
    active, dims = ctx.active, g.ndim
    tangents = [aligned(ctx.tangent(node), dims) for node in active]
    total = None
    for i, first in enumerate(active):
        for j in range(i, len(active)):
            pair = (first, active[j])
            curvature = ctx.cached(pair, lambda pair=pair: _second_derivative(ctx, *pair))
            if curvature is None:
                continue
            # Mixed derivatives count twice, as (a, b) and as (b, a).
            weight = 1 if i == j else 2
            term = inner((tangents[i] * tangents[j]).expand(-1, *g.shape), g * curvature)
            total = weight * term if total is None else total + weight * term
    return total


def _second_derivative(ctx: NodeContext, a: Any, b: Any) -> Tensor:
    """The mixed second derivative of a pointwise operation."""
    closed = second_derivative(ctx)
    if closed is not None:
        return closed

    def derivative(*values: Tensor) -> Tensor:
        fixed = {b: values[1]} if len(values) > 1 else {}
        return jvp(
            lambda p: ctx.call({**fixed, a: p}), (values[0],), (torch.ones_like(values[0]),)
        )[1]

    x, y = ctx.point(a), ctx.point(b)
    if a is b:
        return jvp(derivative, (x,), (torch.ones_like(x),))[1]
    return jvp(lambda q: derivative(x, q), (y,), (torch.ones_like(y),))[1]
