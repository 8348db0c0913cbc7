"""Attention in the graph, softmax(Q K + mask) V, by blocks: no matrix of T x S scores is kept.

A block has some queries of some heads; its scores are computed again in every pass. With
probabilities p, the scores' tangent s' and c = sum(p s') along keys,

    p' = p (s' - c),    y' = p' V + p V',
    <g, y''> = 2 <p', g V'^T> + <ds, (s' - c)^2 + 2 Q' K'>,    ds = p (g V^T - sum(p g V^T)),

and the backward pass has dV = p^T g, dQ = ds K^T and dK = Q^T ds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from ...._utils.devices import is_gpu
from .._fusion import FusedRegion
from .._jvp_rules import matrix_products
from .._node import NodeContext, SecondOrderSum

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]

# Bytes of one tensor of scores of a block, [K, heads, queries, keys]: a few stay in cache.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**26


class Block(NamedTuple):
    """Heads (of all examples) and queries of a block, and the keys that some query can see."""

    heads: slice
    queries: slice
    keys: slice


class Mask(NamedTuple):
    """A node that is added to scores [*lead, T, S]."""

    node: fx.Node
    lead: tuple[int, ...]


class Attention:
    """The nodes of softmax(scale Q K + mask) V, with Q [B, T, d], K [B, d, S], V [B, S, e].

    `steps` lead from Q K to the argument of softmax: numbers multiply, masks are added.
    """

    def __init__(
        self, scores: fx.Node, steps: Sequence[Any], softmax: fx.Node, result: fx.Node
    ) -> None:
        self.scores, self.softmax, self.result = scores, softmax, result
        self.q: Any = scores.args[0]
        self.k: Any = scores.args[1]
        self.v: Any = result.args[1]
        self.steps = steps
        self.scale = prod(step for step in steps if not isinstance(step, Mask))
        self.masks = [step for step in steps if isinstance(step, Mask)]
        self.batch, self.length, self.keys = scores.meta["val"].shape

    @property
    def inputs(self) -> set[fx.Node]:
        """The nodes that blocks are computed from."""
        return {self.q, self.k, self.v, *(mask.node for mask in self.masks)}

    def last_seen(self, values: Any) -> list[int]:
        """The number of keys up to the last that a mask does not hide, for each query."""
        last = [self.keys] * self.length
        if any(not isinstance(step, Mask) and step <= 0 for step in self.steps):
            return last  # a mask of -inf times such a number hides nothing
        for node, _ in self.masks:
            mask = values[node]
            if mask.ndim < 2 or mask.shape[-1] != self.keys:
                continue
            seen = (mask != -torch.inf).reshape(-1, *mask.shape[-2:]).any(0)
            places = torch.arange(1, self.keys + 1, dtype=torch.int32, device=mask.device)
            found = (seen * places).amax(1).tolist()
            found = found * self.length if len(found) == 1 else found
            last = [min(pair) for pair in zip(last, found, strict=True)]
        return last

    def blocks(self, values: Any, directions: int) -> Iterator[Block]:
        """All heads and queries, as many at once as the bytes of a block allow."""
        like = values[self.q]
        room = GPU_BLOCK if is_gpu(like.device) else CPU_BLOCK
        rows = max(1, room // max(1, directions * self.keys * like.element_size()))
        heads, queries = max(1, rows // max(1, self.length)), min(rows, self.length)
        last = values.derived[self.softmax]
        for h in range(0, self.batch, heads):
            for q in range(0, self.length, queries):
                # Softmax of no key at all would be another function: one hidden key is left.
                seen = max(1, *last[q : q + queries])
                yield Block(slice(h, h + heads), slice(q, q + queries), slice(seen))

    def probabilities(self, values: Any, block: Block) -> Tensor:
        """A block's [heads, queries, keys]."""
        q = values[self.q][block.heads, block.queries]
        scores = torch.bmm(q, values[self.k][block.heads, :, block.keys])
        for step in self.steps:
            if isinstance(step, Mask):
                scores += self._mask(values[step.node], step.lead, block)
            else:
                scores *= step
        p: Tensor = self.softmax.target(scores, -1, *self.softmax.args[2:])  # type: ignore[operator]
        return p

    def _mask(self, mask: Tensor, lead: tuple[int, ...], block: Block) -> Tensor:
        """A block's part of a mask, [heads or 1, queries, keys]."""
        lead = lead if mask.ndim > 2 else (1,)  # one for all heads is not copied for each
        if mask.ndim > 2 and prod(mask.shape[:-2]) == 1:
            mask, lead = mask.reshape(mask.shape[-2:]), (1,)
        rows = mask.expand(*lead, self.length, self.keys)[..., block.queries, block.keys]
        if lead == (1,):
            return rows
        # Views, as indices in a tensor would be copied to the device, which no CUDA graph can hold.
        places = np.unravel_index(range(self.batch)[block.heads], lead)
        return torch.stack(
            [rows[place] for place in zip(*(p.tolist() for p in places), strict=True)]
        )

    def probability_tangents(
        self, values: Any, block: Block, p: Tensor, tq: Tensor | None, tk: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """s' - c and p', both [K, heads, queries, keys]; None if neither Q nor K moves."""
        spread = None
        if tq is not None:
            k = values[self.k][block.heads, :, block.keys]
            spread = matrix_products(tq[:, block.heads, block.queries], k)
        if tk is not None:
            q = values[self.q][block.heads, block.queries]
            spread = matrix_products(q, tk[:, block.heads, :, block.keys], spread)
        if spread is None:
            return None
        if self.scale != 1:
            spread *= self.scale
        tp = spread * p
        spread -= tp.sum(-1, keepdim=True)
        return spread, torch.mul(spread, p, out=tp)


class AttentionForward(FusedRegion):
    """Q, K, V -> softmax(scale Q K + mask) V."""

    def __init__(self, attention: Attention, nodes: Sequence[fx.Node]) -> None:
        self.attention, self.nodes, self.result = attention, tuple(nodes), attention.result

    def evaluate(self, values: Any) -> None:
        """Set the value of the result, and `values.derived`: the last key seen by each query."""
        a = self.attention
        values.derived[a.softmax] = a.last_seen(values)
        v = values[a.v]
        out = v.new_empty(a.result.meta["val"].shape)
        for block in a.blocks(values, 1):
            p = a.probabilities(values, block)
            out[block.heads, block.queries] = torch.bmm(p, v[block.heads, block.keys])
        values[a.result] = out

    def run(
        self,
        values: Any,
        tangents: Tangents,
        cotangent: Tensor | None,
        terms: SecondOrderSum | None,
    ) -> None:
        """Set the tangent of the result, and add the second-order term."""
        a = self.attention
        tq, tk, tv = _tangents(a, values, tangents)
        active = next((t for t in (tq, tk, tv) if t is not None), None)
        if active is None:
            return
        v, directions = values[a.v], len(active)
        out = v.new_zeros(directions, *a.result.meta["val"].shape)
        form = v.new_zeros(directions, dtype=torch.float64)
        for block in a.blocks(values, directions):
            p = a.probabilities(values, block)
            moved = a.probability_tangents(values, block, p, tq, tk)
            part = out[:, block.heads, block.queries]
            if moved is not None:
                matrix_products(moved[1], v[block.heads, block.keys], part)
            if tv is not None:
                matrix_products(p, tv[:, block.heads, block.keys], part)
            if terms is not None and cotangent is not None and moved is not None:
                g = cotangent[block.heads, block.queries]
                form += self._second_order(v, g, block, p, moved, (tq, tk, tv))
        tangents[a.result] = out
        if terms is not None and cotangent is not None:
            terms.add(form)

    def _second_order(
        self,
        v: Tensor,
        g: Tensor,
        block: Block,
        p: Tensor,
        moved: tuple[Tensor, Tensor],
        tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """A block's <g, y''> [K] in float64."""
        spread, tp = moved
        tq, tk, tv = tangents
        weights = _score_cotangents(p, torch.bmm(g, v[block.heads, block.keys].mT))
        bends = spread.square_()
        if tq is not None and tk is not None:
            both = torch.matmul(
                tq[:, block.heads, block.queries], tk[:, block.heads, :, block.keys]
            )
            bends.add_(both, alpha=2 * self.attention.scale)
        form = _sums(bends.mul_(weights))
        if tv is not None:
            form += 2 * _sums(tp.mul_(matrix_products(g, tv[:, block.heads, block.keys].mT)))
        return form


class AttentionBackward(FusedRegion):
    """The gradients of an `AttentionForward` in Q, K and V, those that the graph reads."""

    def __init__(
        self, attention: Attention, nodes: Sequence[fx.Node], g: fx.Node, gradients: Gradients
    ) -> None:
        self.attention, self.nodes, self.g, self.gradients = attention, tuple(nodes), g, gradients

    @property
    def inputs(self) -> set[fx.Node]:
        return super().inputs | self.attention.inputs

    def evaluate(self, values: Any) -> None:
        """Set the values of the gradients."""
        found = self._gradients(values, {self.g: values[self.g][None]}, 1)
        for node, gradient in zip(self.gradients, found, strict=True):
            if node is not None:
                values[node] = gradient[0]

    def run(self, values: Any, tangents: Tangents) -> None:
        """Set the tangents of the gradients."""
        a = self.attention
        tq, tk, tv = _tangents(a, values, tangents)
        tg = NodeContext(a.result, values, tangents).tangent(self.g)
        active = next((t for t in (tq, tk, tv, tg) if t is not None), None)
        if active is None:
            return
        moves = tq is not None or tk is not None or tv is not None
        found = self._gradients(
            values, {a.q: tq, a.k: tk, a.v: tv, self.g: tg}, len(active), moves=moves
        )
        for node, gradient in zip(self.gradients, found, strict=True):
            if node is not None:
                tangents[node] = gradient

    def _gradients(
        self, values: Any, tangents: dict[fx.Node, Any], directions: int, *, moves: bool = False
    ) -> Gradients:
        """Tangents [K, ...] of the gradients in Q, K and V, which are linear in g alone."""
        a = self.attention
        q, k, v = values[a.q], values[a.k], values[a.v]
        tq, tk, tv = (tangents.get(node) for node in (a.q, a.k, a.v))
        tg = tangents[self.g]
        g = values[self.g] if moves else None
        dq = q.new_zeros(directions, *q.shape)
        dk = q.new_zeros(directions, a.batch, a.keys, q.shape[2])  # of K^T, whose rows are dense
        dv = q.new_zeros(directions, *v.shape)
        for block in a.blocks(values, directions):
            heads, queries, keys = block
            p = a.probabilities(values, block)
            vt = v[heads, keys].mT
            w = None
            if tg is not None:
                tg_block = tg[:, heads, queries]
                matrix_products(p.mT, tg_block, dv[:, heads, keys])
                w = matrix_products(tg_block, vt)
            if g is not None:
                g_block = g[heads, queries]
                ds = torch.bmm(g_block, vt)
                ds -= (ds * p).sum(-1, keepdim=True)
                moved = a.probability_tangents(values, block, p, tq, tk)
                if tv is not None:
                    w = matrix_products(g_block, tv[:, heads, keys].mT, w)
                if w is not None:
                    w *= p
                if moved is not None:
                    tp = moved[1]
                    matrix_products(tp.mT, g_block, dv[:, heads, keys])
                    w = tp.mul_(ds) if w is None else w.addcmul_(tp, ds)
                ds *= p
                if a.scale != 1:
                    ds *= a.scale
                if tk is not None:
                    matrix_products(ds, tk[:, heads, :, keys].mT, dq[:, heads, queries])
                if tq is not None:
                    matrix_products(ds.mT, tq[:, heads, queries], dk[:, heads, keys])
            else:
                assert w is not None
                w *= p
            assert w is not None
            # w = p' (g V^T - sum(p g V^T)) + p (g V^T)', without its mean over keys
            w.addcmul_(p, w.sum(-1, keepdim=True), value=-1)
            if a.scale != 1:
                w *= a.scale
            matrix_products(w, k[heads, :, keys].mT, dq[:, heads, queries])
            matrix_products(w.mT, q[heads, queries], dk[:, heads, keys])
        return Gradients(dq, dk.mT, dv)


class Gradients(NamedTuple):
    """Nodes or tensors of the gradients in Q [B, T, d], K [B, d, S] and V [B, S, e]."""

    q: Any
    k: Any
    v: Any


def _tangents(
    a: Attention, values: Any, tangents: Tangents
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ctx = NodeContext(a.result, values, tangents)
    return ctx.tangent(a.q), ctx.tangent(a.k), ctx.tangent(a.v)


def _score_cotangents(p: Tensor, cotangent: Tensor) -> Tensor:
    """p (g - sum(p g)), overwriting g."""
    cotangent -= (cotangent * p).sum(-1, keepdim=True)
    return cotangent.mul_(p)


def _sums(products: Tensor) -> Tensor:
    return products.flatten(1).sum(1, dtype=torch.float64)
