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
        chosen = torch.arange(self.batch, device=mask.device)[block.heads]
        return rows[torch.unravel_index(chosen, lead)]

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


# -- patterns --------------------------------------------------------------------------------

_SAME = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.clone.default, aten.alias.default,
}  # fmt: skip
_TRANSPOSES = {aten.transpose.int, aten.permute.default}


def find_attention(
    forward: Sequence[fx.Node], backward: Sequence[fx.Node]
) -> tuple[list[AttentionForward], list[AttentionBackward]]:
    """Attention in both passes, where no other operation reads scores or probabilities."""
    ahead: list[AttentionForward] = []
    behind: list[AttentionBackward] = []
    place = {node: i for i, node in enumerate((*forward, *backward))}
    first_behind = len(forward)
    for softmax in forward:
        match = _match(softmax) if softmax.target in _SOFTMAX else None
        if match is None:
            continue
        attention, inside, g, gradients = match
        nodes = sorted(inside, key=place.__getitem__)
        ahead.append(AttentionForward(attention, [n for n in nodes if place[n] < first_behind]))
        behind_nodes = [n for n in nodes if place[n] >= first_behind]
        behind.append(AttentionBackward(attention, behind_nodes, g, gradients))
    return ahead, behind


_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)


def _match(softmax: fx.Node) -> tuple[Attention, set[fx.Node], fx.Node, Gradients] | None:
    """Attention around a softmax, its nodes in both passes, the cotangent and the gradients."""
    shape = softmax.meta["val"].shape
    if softmax.args[1] not in (-1, len(shape) - 1) or any(softmax.args[2:]) or softmax.kwargs:
        return None
    found = _scores(softmax.args[0], softmax)
    if found is None:
        return None
    scores, steps, inside = found
    # The probabilities, under all names, and who reads them.
    names, readers = _names(softmax)
    results = [r for r in readers if r.target is aten.bmm.default and r.args[0] in names]
    results = [r for r in results if r.args[0] in names and not names[r.args[0]]]
    values = [r for r in readers if r.target is aten.bmm.default and names.get(r.args[0])]
    softmax_backwards = [r for r in readers if r.target is aten._softmax_backward_data.default]
    if len(results) != 1 or len(values) > 1 or len(softmax_backwards) != 1:
        return None
    if {*results, *values, *softmax_backwards} != readers:
        return None
    (result,), (through,) = results, softmax_backwards
    if result.args[1] in names or through.args[1] is not softmax:
        return None
    # The cotangent of the probabilities is g V^T.
    up = _chain_up(through.args[0], through)
    if up is None or not _is_transpose(up[0].args[1], result.args[1]):
        return None
    outer, above = up
    g = outer.args[0]
    if values and values[0].args[1] is not g:
        return None
    down = _chain_down(through)
    attention = Attention(scores, steps, softmax, result)
    if down is None or down[1] != attention.scale:
        return None
    ds, _, below = down
    gradients = _score_gradients(ds, attention)
    if gradients is None or any(len(n.meta["val"].shape) != 3 for n in (scores, result, ds)):
        return None
    inside |= {*names, softmax, result, through, outer, *above, *below, *values}
    inside |= {node for node in gradients if node is not None}
    every = Gradients(*gradients, values[0] if values else None)
    return attention, inside, g, every  # type: ignore[return-value]


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.op != "output"]


def _same_matrices(node: fx.Node, source: Any) -> bool:
    """Whether a node only renames leading axes of [..., T, S]."""
    if node.target not in _SAME or not isinstance(source, fx.Node):
        return False
    shape, other = node.meta["val"].shape, source.meta["val"].shape
    return bool(shape[-2:] == other[-2:] and shape.numel() == other.numel())


def _factor(node: fx.Node) -> float | None:
    """The number by which a node multiplies its first argument."""
    if node.kwargs or len(node.args) != 2 or not isinstance(node.args[1], int | float):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return node.args[1]
    return 1 / node.args[1] if node.target in (aten.div.Tensor, aten.div.Scalar) else None


def _scores(node: Any, user: fx.Node) -> tuple[fx.Node, list[Any], set[fx.Node]] | None:
    """The product Q K that leads to a node, the steps from it, and all nodes on the way."""
    if not isinstance(node, fx.Node) or _users(node) != [user]:
        return None
    if node.target is aten.bmm.default:
        return node, [], {node}
    source = node.args[0] if node.args else None
    factor = _factor(node)
    if node.target is aten.add.Tensor and not node.kwargs:
        for source, mask in (node.args[:2], node.args[1::-1]):
            if isinstance(mask, fx.Node) and _shape(source) == _shape(node):
                found = _scores(source, node)
                if found is not None:
                    step = Mask(mask, tuple(_shape(node)[:-2]))
                    return found[0], [*found[1], step], {*found[2], node}
        return None
    if factor is None and not _same_matrices(node, source):
        return None
    found = _scores(source, node)
    steps = [] if factor is None else [factor]
    return None if found is None else (found[0], [*found[1], *steps], {*found[2], node})


def _shape(node: Any) -> Any:
    return node.meta["val"].shape if isinstance(node, fx.Node) else None


def _names(node: fx.Node) -> tuple[dict[Any, bool], set[fx.Node]]:
    """Views of [..., T, S], each with whether it is transposed, and the other users of all."""
    names: dict[Any, bool] = {node: False}
    readers: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        name = waiting.pop()
        for user in _users(name):
            if not names[name] and _same_matrices(user, name):
                names[user] = False
            elif not names[name] and _is_transpose(user, name):
                names[user] = True
            else:
                readers.add(user)
                continue
            waiting.append(user)
    return names, readers


def _is_transpose(node: Any, source: Any) -> bool:
    """Whether a node is the transpose of the matrices of another."""
    if not isinstance(node, fx.Node) or node.target not in _TRANSPOSES:
        return False
    if node.args[0] is not source:
        return False
    rank = len(source.meta["val"].shape)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]


def _chain_up(node: Any, user: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The product that leads to a node by views alone, and the views."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and _users(node) == [user]:
        if node.target is aten.bmm.default:
            return node, chain
        if not _same_matrices(node, node.args[0]):
            return None
        chain.append(node)
        node, user = node.args[0], node
    return None


def _chain_down(node: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """The last node of those that rename or scale, the scale, and all of them after the first."""
    chain: list[fx.Node] = []
    scale = 1.0
    while True:
        users = _users(node)
        if len(users) != 1 or users[0].args[0] is not node:
            return node, scale, chain
        factor = _factor(users[0])
        if factor is None and not _same_matrices(users[0], node):
            return node, scale, chain
        scale *= 1.0 if factor is None else factor
        node = users[0]
        chain.append(node)


def _score_gradients(ds: fx.Node, a: Attention) -> tuple[fx.Node | None, fx.Node | None] | None:
    """The gradients in Q and K, if nothing else reads the scores' cotangent."""
    q = k = None
    for user in _users(ds):
        if user.target is not aten.bmm.default:
            return None
        if user.args[0] is ds and q is None and _is_transpose(user.args[1], a.k):
            q = user
        elif user.args[1] is ds and k is None and _is_transpose(user.args[0], a.q):
            k = user
        else:
            return None
    return q, k
