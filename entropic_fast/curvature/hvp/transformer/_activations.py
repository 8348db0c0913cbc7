"""Closed forms of first and second derivatives of activations, each in a few passes over memory.

Torch's forward mode differentiates the others, in more passes; see `pointwise` in `_jvp_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._node import NodeContext

aten = torch.ops.aten


class Activation(NamedTuple):
    """Derivatives of an activation at x, from its node or that of its backward pass."""

    first: Callable[[NodeContext, Tensor], Tensor]
    second: Callable[[NodeContext, Tensor], Tensor]


def _gelu_first(ctx: NodeContext, x: Tensor) -> Tensor:
    return aten.gelu_backward(torch.ones_like(x), x, approximate=_approximate(ctx))


def _gelu_second(ctx: NodeContext, x: Tensor) -> Tensor:
    square = x * x
    if _approximate(ctx) == "none":  # density (2 - x^2)
        density = (square * -0.5).exp_().mul_(1 / sqrt(2 * pi))
        return density.mul_(2 - square)
    # x (1 + t) / 2 with t = tanh(u) and u = beta (x + kappa x^3)
    beta, kappa = sqrt(2 / pi), 0.044715
    t = (square * kappa).add_(1).mul_(x).mul_(beta).tanh_()
    slope = (square * (3 * kappa)).add_(1).mul_(beta)  # u'
    bend = x * (3 * beta * kappa) - t * slope.square()  # u'' / 2 - t u'^2
    return (1 - t * t).mul_(slope.addcmul_(x, bend))


def _approximate(ctx: NodeContext) -> Any:
    return ctx.node.kwargs.get("approximate", "none")


def _silu_first(ctx: NodeContext, x: Tensor) -> Tensor:
    sigma = torch.sigmoid(x)
    return (1 - sigma).mul_(x).add_(1).mul_(sigma)


def _silu_second(ctx: NodeContext, x: Tensor) -> Tensor:
    sigma = torch.sigmoid(x)
    rest = 1 - sigma
    return (rest - sigma).mul_(x).add_(2).mul_(rest).mul_(sigma)


GELU, SILU = Activation(_gelu_first, _gelu_second), Activation(_silu_first, _silu_second)
FORWARD: dict[Any, Activation] = {aten.gelu.default: GELU, aten.silu.default: SILU}
BACKWARD: dict[Any, Activation] = {  # of (gradient, x)
    aten.gelu_backward.default: GELU,
    aten.silu_backward.default: SILU,
}


def first_derivative(ctx: NodeContext, node: Any) -> Tensor | None:
    """The derivative in an argument; None for operations without a closed form here."""
    target = ctx.node.target
    if target in FORWARD:
        return FORWARD[target].first(ctx, ctx.value(0))
    if target not in BACKWARD or ctx.node.args[0] is ctx.node.args[1]:
        return None
    x = ctx.value(1)
    if node is ctx.node.args[0]:
        return BACKWARD[target].first(ctx, x)
    return BACKWARD[target].second(ctx, x) * ctx.value(0)


def second_derivative(ctx: NodeContext) -> Tensor | None:
    """The second derivative of an activation; None for operations without a closed form here."""
    target = ctx.node.target
    return FORWARD[target].second(ctx, ctx.value(0)) if target in FORWARD else None
