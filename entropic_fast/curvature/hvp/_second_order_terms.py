"""Second-order forms <g, D^2 f [a'_k, a'_k]> of operations f, for each of K directions.

g is the cotangent of the operation's result, a' the tangents of its arguments. Summed over the
operations of a network they are what the network's own curvature adds to v^T H v: the sum of
<g, second derivative> is propagated by the backward pass once, instead of second-order
coefficients by a forward pass for every direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.forward_mode import jvp
from ...ops import norm_act_tangents as jet
from ._batch_norm import statistics
from ._convolution import Back, Geometry, _blocks
from ._fusion import pixels, spread_pixels
from ._jvp_rules import aligned
from ._node import Step, form_by_torch

aten = torch.ops.aten
Form = Callable[[Step, Tensor], Tensor | None]
FORMS: dict[Any, Form] = {}


def form(step: Step, cotangents: dict[int, Tensor]) -> Tensor | None:
    """The form of an operation that is not linear; None for zero.  # [K] float64

    Args:
        cotangents: of its results, by their number.
    """
    target = step.node.target
    if target in FORMS:
        return FORMS[target](step, cotangents[0])
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return _pointwise(step, cotangents[0])
    return form_by_torch(step, cotangents)


def rule(*targets: Any) -> Callable[[Form], Form]:
    def register(function: Form) -> Form:
        FORMS.update(dict.fromkeys(targets, function))
        return function

    return register


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of [K, *shape] and [K, *shape] or [*shape].  # [K] float64"""
    if a.ndim == 5 and b.ndim == 5:
        return jet.inner(pixels(a), spread_pixels(b))
    products = a * b
    return products.reshape(len(products), -1).sum(1, dtype=torch.float64)


@rule(aten.convolution.default)
def _convolution(step: Step, g: Tensor) -> Tensor | None:
    tx, tw = step.tangent(0), step.tangent(1)
    if tx is None or tw is None:
        return None
    geometry, x = Geometry.of(step, 3), step.value(0)
    back = Back(geometry, g, x, tw.shape[3:])
    found = []
    for rows in _blocks(tw, x.shape[1]):
        found.append(inner(tx[rows], back.with_weights(g, tw[rows])))
    return 2 * (found[0] if len(found) == 1 else torch.cat(found))


@rule(aten.mm.default, aten.bmm.default)
def _mm(step: Step, g: Tensor) -> Tensor | None:
    return _product(step, 0, 1, g)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(step: Step, g: Tensor) -> Tensor | None:
    found = _product(step, 1, 2, g)
    return None if found is None else found * step.argument(4)


def _product(step: Step, i: int, j: int, g: Tensor) -> Tensor | None:
    a, b = step.tangent(i), step.tangent(j)
    if a is None or b is None:
        return None
    return 2 * inner(a, torch.matmul(g, b.transpose(-1, -2)))


@rule(aten.mul.Tensor)
def _mul(step: Step, g: Tensor) -> Tensor | None:
    a, b = step.tangent(0), step.tangent(1)
    if a is None or b is None:
        return None
    dims = g.ndim
    return 2 * inner(aligned(a, dims) * aligned(b, dims), g)


@rule(aten.native_batch_norm.default)
def _batch_norm(step: Step, g: Tensor) -> Tensor | None:
    tx, tw = step.tangent(0), step.tangent(1)
    if tx is None or tw is None:
        return None
    _, rstd = statistics(step, 3, 4, 7)
    sums = (tx * g).sum([1, *range(3, tx.ndim)], dtype=torch.float64)  # [K, C]
    return 2 * (sums * tw * rstd.flatten()).sum(1)


def _pointwise(step: Step, g: Tensor) -> Tensor | None:
    """Any pointwise operation: its second derivatives in pairs of moving arguments."""
    moving, dims = step.moving, g.ndim
    tangents = [aligned(step.tangent(node), dims) for node in moving]
    total = None
    for i, first in enumerate(moving):
        for j in range(i, len(moving)):
            bend = _bend(step, first, moving[j])
            if bend is None:
                continue
            weight = 1 if i == j else 2
            term = inner((tangents[i] * tangents[j]).expand(-1, *g.shape), g * bend)
            total = weight * term if total is None else total + weight * term
    return total


def _bend(step: Step, a: Any, b: Any) -> Tensor:
    """The mixed second derivative of a pointwise operation."""

    def slope(*values: Tensor) -> Tensor:
        other = {b: values[1]} if len(values) > 1 else {}
        return jvp(
            lambda p: step.call({**other, a: p}), (values[0],), (torch.ones_like(values[0]),)
        )[1]

    x, y = step.point(a), step.point(b)
    if a is b:
        return jvp(slope, (x,), (torch.ones_like(x),))[1]
    return jvp(lambda q: slope(x, q), (y,), (torch.ones_like(y),))[1]
