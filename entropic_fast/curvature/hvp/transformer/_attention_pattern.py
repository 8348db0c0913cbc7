"""Where a graph has attention: softmax between two products, in both passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ._attention import Attention, AttentionBackward, AttentionForward, Gradients, Mask

aten = torch.ops.aten

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
    products = [r for r in readers if r.target is aten.bmm.default]
    results = [r for r in products if names.get(r.args[0]) is False]
    values = [r for r in products if names.get(r.args[0]) is True]
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
