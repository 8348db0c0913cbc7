"""Tangents of operations in K directions at once, [K, *shape].

A rule gets a `Step` and returns the tangent of its result. Every rule here is an ordinary call
of the same operation on stacked tensors; an operation without a rule goes to `by_torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._torch.forward_mode import jvp
from ._node import Step, by_torch

aten = torch.ops.aten
Rule = Callable[[Step], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def tangent(step: Step) -> Any:
    """The tangent of an operation with moving arguments."""
    target = step.node.target
    if target in RULES:
        return RULES[target](step)
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise(step)
    return by_torch(step)


def aligned(tangent: Tensor, dims: int) -> Tensor:
    """[K, *shape] with ones between, so that it broadcasts as shape does in `dims` dimensions."""
    missing = dims + 1 - tangent.ndim
    if missing <= 0:
        return tangent
    return tangent.reshape(len(tangent), *[1] * missing, *tangent.shape[1:])


# -- shapes ----------------------------------------------------------------------------------


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(step: Step) -> Any:
    t = step.tangent(0)
    return t.reshape(len(t), *step.shape)


@rule(aten.expand.default)
def _expand(step: Step) -> Any:
    t = aligned(step.tangent(0), len(step.shape))
    return t.expand(len(t), *step.shape)


@rule(aten.permute.default)
def _permute(step: Step) -> Any:
    t = step.tangent(0)
    return t.permute(0, *(d % (t.ndim - 1) + 1 for d in step.argument(1)))


@rule(aten.t.default)
def _t(step: Step) -> Any:
    t = step.tangent(0)
    return t.transpose(-1, -2) if t.ndim > 2 else t


@rule(aten.transpose.int)
def _transpose(step: Step) -> Any:
    t, rank = step.tangent(0), step.value(0).ndim
    return t.transpose(step.argument(1) % rank + 1, step.argument(2) % rank + 1)


@rule(aten.unsqueeze.default)
def _unsqueeze(step: Step) -> Any:
    return step.tangent(0).unsqueeze(step.argument(1) % len(step.shape) + 1)


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(step: Step) -> Any:
    t = step.tangent(0)
    return t.reshape(len(t), *step.shape)


@rule(aten.select.int)
def _select(step: Step) -> Any:
    rank = step.value(0).ndim
    return step.tangent(0).select(step.argument(1) % rank + 1, step.argument(2))


@rule(aten.slice.Tensor)
def _slice(step: Step) -> Any:
    dim = step.argument(1) % step.value(0).ndim + 1
    return aten.slice(step.tangent(0), dim, *(step.argument(i) for i in (2, 3, 4)))


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(step: Step) -> Any:
    base, part = step.tangent(0), step.tangent(1)
    k = len(part if base is None else base)
    base = step.value(0).new_zeros(1).expand(k, *step.shape) if base is None else base
    part = step.value(1).new_zeros(1).expand(k, *step.value(1).shape) if part is None else part
    dim = step.argument(2) % len(step.shape) + 1
    return step.node.target(base, part, dim, *step.node.args[3:])


@rule(aten.cat.default)
def _cat(step: Step) -> Any:
    nodes, dim = step.argument(0), step.argument(1)
    moving = next(t for t in (step.tangent(a) for a in nodes) if t is not None)
    parts = []
    for node in nodes:
        t = step.tangent(node)
        if t is None:
            value = step.value(node)
            t = value.new_zeros(1).expand(len(moving), *value.shape)
        parts.append(t)
    return torch.cat(parts, dim % len(step.shape) + 1)


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(step: Step) -> Any:
    return step.tangent(0)


@rule(aten.neg.default)
def _neg(step: Step) -> Any:
    return -step.tangent(0)


# -- sums ------------------------------------------------------------------------------------


@rule(aten.sum.default)
def _sum_all(step: Step) -> Any:
    return step.tangent(0).reshape(len(step.tangent(0)), -1).sum(1)


@rule(aten.mean.default)
def _mean_all(step: Step) -> Any:
    return step.tangent(0).reshape(len(step.tangent(0)), -1).mean(1)


@rule(aten.sum.dim_IntList, aten.mean.dim)
def _sum(step: Step) -> Any:
    t, rank = step.tangent(0), step.value(0).ndim
    dims = step.argument(1) or range(rank)
    shifted = [d % rank + 1 for d in dims]
    operation = torch.sum if step.node.target is aten.sum.dim_IntList else torch.mean
    return operation(t, shifted, bool(step.argument(2)))


# -- pointwise -------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(step: Step) -> Any:
    a, b = step.tangent(0), step.tangent(1)
    sign = -1 if step.node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1
    alpha = sign * step.argument(2)
    dims = len(step.shape)
    if a is not None and b is not None:
        out = torch.add(aligned(a, dims), aligned(b, dims), alpha=alpha)
    elif a is not None:
        out = aligned(a, dims)
    else:
        out = aligned(b, dims) if alpha == 1 else aligned(b, dims) * alpha
    return out.expand(len(out), *step.shape)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(step: Step) -> Any:
    a, b, dims = step.tangent(0), step.tangent(1), len(step.shape)
    out = None
    if a is not None:
        out = aligned(a, dims) * step.value(1)
    if b is not None:
        second = aligned(b, dims) * step.value(0)
        out = second if out is None else out + second
    return out


@rule(aten.div.Scalar)
def _div(step: Step) -> Any:
    return step.tangent(0) / step.value(1)


@rule(aten.relu.default)
def _relu(step: Step) -> Any:
    # The derivative at 0 is 0, as in torch.
    return step.tangent(0) * (step.value(step.node) > 0)


@rule(aten.threshold_backward.default)
def _threshold_backward(step: Step) -> Any:
    t = step.tangent(0)
    return None if t is None else t * (step.value(1) > step.argument(2))


def pointwise(step: Step) -> Any:
    """Any pointwise operation: its derivatives in each argument, times their tangents."""
    out = None
    for node, slope in slopes(step).items():
        term = aligned(step.tangent(node), len(step.shape)) * slope
        out = term if out is None else out + term
    assert out is not None
    return out.expand(len(out), *step.shape)


def slopes(step: Step) -> dict[Any, Tensor]:
    """Derivatives of a pointwise operation in its moving arguments, of the result's shape."""
    found = {}
    for node in step.moving:
        point = step.point(node)
        found[node] = jvp(
            lambda a, node=node: step.call({node: a}), (point,), (torch.ones_like(point),)
        )[1]
    return found


# -- products --------------------------------------------------------------------------------


@rule(aten.mm.default, aten.bmm.default)
def _mm(step: Step) -> Any:
    return _bilinear(step, 0, 1, torch.matmul)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(step: Step) -> Any:
    out = _bilinear(step, 1, 2, torch.matmul)
    beta, alpha = step.argument(3), step.argument(4)
    if out is not None and alpha != 1:
        out = out * alpha
    c = step.tangent(0)
    if c is not None:
        c = aligned(c, len(step.shape))
        c = c if beta == 1 else c * beta
        out = c.expand(len(c), *step.shape) if out is None else out + c
    return out


def _bilinear(step: Step, i: int, j: int, product: Callable[[Tensor, Tensor], Tensor]) -> Any:
    a, b = step.tangent(i), step.tangent(j)
    out = None
    if a is not None:
        out = product(a, step.value(j))
    if b is not None:
        second = product(step.value(i), b)
        out = second if out is None else out.add_(second)
    return out


@rule(aten.embedding.default)
def _embedding(step: Step) -> Any:
    # The padding row is a constant: torch gives it no gradient.
    t, tokens, padding = step.tangent(0), step.value(1), step.argument(2)
    out = t[:, tokens]
    if padding >= 0:
        out = out.masked_fill((tokens == padding)[..., None], 0)
    return out
