"""The order in which an interpreter visits the regions of a graph, and how long values live."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from ._fusion import FusedRegion

aten = torch.ops.aten


def depends_on(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    """The nodes (in topological order) that depend on sources."""
    reached = set(sources)
    for node in nodes:
        if any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
    return reached - sources


def has_constant_term(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a node of the backward pass need not be 0 at u = 0, as it joins u and constants."""
    if node.target not in _JOINING:
        return False
    return any(
        a not in backward and a.meta["val"].is_floating_point() and not _is_zero(a)
        for a in node.all_input_nodes
    )


def _is_zero(node: fx.Node) -> bool:
    if node.target is aten.scalar_tensor.default:
        return bool(node.args[0] == 0)
    return node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


_JOINING = {
    aten.cat.default, aten.stack.default, aten.add.Tensor, aten.sub.Tensor, aten.where.self,
}  # fmt: skip


class SingleNode(FusedRegion):
    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)


def scheduled(nodes: Sequence[fx.Node], fused: Sequence[FusedRegion]) -> list[FusedRegion]:
    """Regions of all nodes in topological order, in the order of the graph where that is free."""
    owner: dict[fx.Node, FusedRegion] = {node: region for region in fused for node in region.nodes}
    for node in nodes:
        owner.setdefault(node, SingleNode(node))
    regions = list(dict.fromkeys(owner.values()))
    position = {node: i for i, node in enumerate(nodes)}
    rank = {region: min(position[node] for node in region.nodes) for region in regions}
    # A region may have to wait for an input that the graph computes after the region's first node.
    waits_for = {
        region: {owner[a] for a in region.inputs if a in owner} - {region} for region in regions
    }
    followers: dict[FusedRegion, list[FusedRegion]] = {region: [] for region in regions}
    for region, inputs in waits_for.items():
        for source in inputs:
            followers[source].append(region)
    # Ranks are distinct, as every node is in one region.
    by_rank = {rank[region]: region for region in regions}
    ready = [rank[region] for region in regions if not waits_for[region]]
    heapq.heapify(ready)
    order: list[FusedRegion] = []
    while ready:
        region = by_rank[heapq.heappop(ready)]
        order.append(region)
        for follower in followers[region]:
            waits_for[follower].discard(region)
            if not waits_for[follower]:
                heapq.heappush(ready, rank[follower])
    assert len(order) == len(regions)
    return order


def last_uses(
    regions: Sequence[FusedRegion], kept: set[fx.Node]
) -> dict[FusedRegion, list[fx.Node]]:
    """Nodes, except those kept, by the last region that makes or reads them."""
    last: dict[fx.Node, FusedRegion] = {}
    for region in regions:
        for node in (*region.inputs, *region.nodes):
            # Later regions overwrite earlier ones: the last use is left.
            last[node] = region
    # Tangents of all nodes at once would take K times the memory of the values.
    by_region: dict[FusedRegion, list[fx.Node]] = {}
    for node, region in last.items():
        if node not in kept:
            by_region.setdefault(region, []).append(node)
    return by_region


# Rules of these read no value of the operation's own, nor those of arguments.
_STRUCTURAL = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default,
    aten._unsafe_view.default, aten.reshape.default, aten.clone.default, aten.alias.default,
    aten.expand.default, aten.sum.dim_IntList, aten.unsqueeze.default,
}  # fmt: skip
_PRODUCTS = {aten.mm.default, aten.bmm.default}


def unread(nodes: Sequence[fx.Node], read: set[fx.Node]) -> set[fx.Node]:
    """Nodes (in topological order) whose values no rule reads, except those in `read`.

    They end in gradients: only their tangents count.
    """
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        users = [user for user in node.users if user.op != "output"]
        ends = all(user in found and user.target in _STRUCTURAL for user in users)
        if node not in read and ends and node.target in _STRUCTURAL | _PRODUCTS:
            found.add(node)
    return found
