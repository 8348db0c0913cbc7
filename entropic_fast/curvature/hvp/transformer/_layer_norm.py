"""Layer normalization in the graph: regions whose tangents take one pass over memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ....ops.row_norm_tangents import jvp, vjp_tangent
from .._fusion import FusedRegion
from .._node import NodeContext, SecondOrderSum

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]


class LayerNormForward(FusedRegion):
    """x -> layer_norm(x), with the statistics that only its backward pass reads."""

    def __init__(self, norm: fx.Node, results: Sequence[fx.Node]) -> None:
        self.norm, self.nodes = norm, (norm, *results)
        self.result = next(node for node in results if node.args[1] == 0)

    def evaluate(self, values: Any) -> None:
        """Set the values of the nodes, and `values.derived`: normal [M, d] and rstd [M]."""
        ctx = NodeContext(self.norm, values, {})
        x, width = ctx.value(0), prod(ctx.argument(1))
        results = self.norm.target(x, *(ctx.value(i) for i in range(1, 5)))
        values[self.norm] = results
        for node in self.nodes[1:]:
            values[node] = results[node.args[1]]
        _, mean, rstd = results
        normal = ((x - mean) * rstd).reshape(-1, width)
        values.derived[self.norm] = (normal, rstd.reshape(-1))

    def run(
        self,
        values: Any,
        tangents: Tangents,
        cotangent: Tensor | None,
        terms: SecondOrderSum | None,
    ) -> None:
        """Set the tangent of the result, and add the second-order term."""
        ctx = NodeContext(self.norm, values, tangents)
        tx, tweight, tbias = ctx.tangent(0), ctx.tangent(2), ctx.tangent(3)
        active = next((t for t in (tx, tweight, tbias) if t is not None), None)
        if active is None:
            return
        normal, rstd = values.derived[self.norm]
        k = len(active)
        shape = self.result.meta["val"].shape
        rows = normal.new_zeros(k, *normal.shape) if tx is None else tx.reshape(k, *normal.shape)
        weight = ctx.value(2)
        out, term = jvp(
            rows,
            normal,
            rstd,
            weight=_flat(weight, 1),
            tweight=_flat(tweight, 2),
            tbias=_flat(tbias, 2),
            cotangent=None if terms is None or cotangent is None else cotangent.reshape_as(normal),
        )
        if terms is not None and cotangent is not None:
            terms.add(term)
        tangents[self.result] = out.view(k, *shape)


class LayerNormBackward(FusedRegion):
    """The gradients of a `LayerNormForward` in its input, weight and bias."""

    def __init__(self, norm: fx.Node, forward: LayerNormForward) -> None:
        self.norm, self.forward, self.nodes = norm, forward, (norm,)
        self._weights = any(user.args[1] in (1, 2) for user in norm.users)

    def evaluate(self, values: Any) -> None:
        """Set the gradients that the graph reads."""
        ctx = NodeContext(self.norm, values, {})
        g, weight = ctx.value(0), ctx.value(5)
        normal, rstd = values.derived[self.forward.norm]
        found = vjp_tangent(
            normal, rstd, u=g.reshape(1, *normal.shape), weight=_flat(weight, 1),
            weights=self._weights,
        )  # fmt: skip
        values[self.norm] = self._shaped(found, (), ctx)

    def run(self, values: Any, tangents: Tangents) -> None:
        """Set the tangents of the gradients."""
        ctx = NodeContext(self.norm, values, tangents)
        tg, tx, tweight = ctx.tangent(0), ctx.tangent(1), ctx.tangent(5)
        active = next((t for t in (tg, tx, tweight) if t is not None), None)
        if active is None:
            return
        k = len(active)
        normal, rstd = values.derived[self.forward.norm]
        moves = tx is not None or tweight is not None
        found = vjp_tangent(
            normal,
            rstd,
            u=None if tg is None else tg.reshape(k, *normal.shape),
            t=None if tx is None else tx.reshape(k, *normal.shape),
            weight=_flat(ctx.value(5), 1),
            tweight=_flat(tweight, 2),
            cotangent=ctx.value(0).reshape_as(normal) if moves else None,
            weights=self._weights,
        )
        tangents[self.norm] = self._shaped(found, (k,), ctx)

    def _shaped(self, found: Sequence[Tensor], lead: tuple[int, ...], ctx: NodeContext) -> Any:
        """Results in the shapes of the graph; None for the gradients of absent weights."""
        shape, inner = self.norm.args[0].meta["val"].shape, ctx.argument(2)  # type: ignore[union-attr]
        x, weight, bias = found
        if not self._weights:
            return x.reshape(*lead, *shape), None, None
        return (
            x.reshape(*lead, *shape),
            None if ctx.argument(5) is None else weight.reshape(*lead, *inner),
            None if ctx.argument(6) is None else bias.reshape(*lead, *inner),
        )


def _flat(tensor: Tensor | None, dims: int) -> Tensor | None:
    """[d] for dims = 1, [K, d] for dims = 2."""
    if tensor is None:
        return None
    return tensor.reshape(-1) if dims == 1 else tensor.reshape(len(tensor), -1)


def find_layer_norms(
    forward: Sequence[fx.Node], backward: Sequence[fx.Node]
) -> tuple[list[LayerNormForward], list[LayerNormBackward]]:
    """Layer normalizations of both passes whose statistics only their backward passes read."""
    ahead: list[LayerNormForward] = []
    behind: list[LayerNormBackward] = []
    inside = set(backward)
    for norm in forward:
        if norm.target is not aten.native_layer_norm.default or not all(norm.args[1]):  # type: ignore[arg-type]
            continue
        results = [user for user in norm.users if user.target is operator.getitem]
        readers = {user: None for r in results if r.args[1] != 0 for user in r.users}
        normal = any(r.args[1] == 0 for r in results)
        if normal and all(u in inside and _is_backward_of(u, norm) for u in readers):
            region = LayerNormForward(norm, results)
            ahead.append(region)
            behind += [LayerNormBackward(user, region) for user in readers]
    return ahead, behind


def _is_backward_of(node: fx.Node, norm: fx.Node) -> bool:
    return node.target is aten.native_layer_norm_backward.default and node.args[1] is norm.args[0]
