"""Values, tangents and second-order forms of a captured network."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from ..._torch.architecture_key import key_of
from ..._utils import trees
from ..._utils.trees import Tree
from . import _batch_norm as batch_norm
from . import _convolution as convolution
from ._capture import Graph
from ._fusion import (
    FusedRegion,
    NormActBackward,
    NormActForward,
    find_backward_regions,
    find_forward_regions,
)
from ._jvp_rules import tangent
from ._node import NodeContext, SecondOrderSum
from ._second_order_terms import second_order_term

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]


class PrimalValues(dict[fx.Node, Any]):
    """Values of nodes at a point, and the interpreter that made them.

    Attributes:
        derived: what fused chains need of them, by node.
        read: nodes that tangents have asked for.
    """

    def __init__(self, interpreter: GraphInterpreter) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.derived: dict[fx.Node, Any] = {}
        self.read: set[fx.Node] = set()

    def __getitem__(self, node: fx.Node) -> Any:
        self.read.add(node)
        return super().__getitem__(node)

    def prune(self) -> int:
        """Let go of what tangents have not read; the bytes of the rest."""
        placed = {*self.interpreter.graph.parameters, *self.interpreter.graph.buffers}
        for node in self.keys() - self.read - placed - {self.interpreter.graph.u}:
            del self[node]
        held = [value for node, value in self.items() if node not in placed]
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaf in tree_leaves((held, list(self.derived.values())))
            if isinstance(leaf, Tensor)
        }
        return sum(storages.values())


_LOSSES = 256  # that models of an architecture share, at most


class VerifiedLosses:
    """Kinds of results and the losses for which they were compared; keeps no loss alive.

    Losses that compute the same are one for all models of an architecture.

    >>> checked, loss = VerifiedLosses(), torch.nn.MSELoss()
    >>> checked.add("hessian", loss)
    >>> ("hessian", loss) in checked, ("ggn", loss) in checked
    (True, False)
    """

    def __init__(self, shared: set[Hashable] | None = None) -> None:
        self._known: dict[tuple[Hashable, int], Any] = {}
        self._shared: set[Hashable] = set() if shared is None else shared

    def for_another_model(self) -> VerifiedLosses:
        """What is known for the losses of another model of the same architecture."""
        return VerifiedLosses(self._shared)

    def __contains__(self, pair: tuple[Hashable, Any]) -> bool:
        kind, loss = pair
        known = self._known.get((kind, id(loss)))  # losses need not be hashable
        if known is not None and known() is loss:
            return True
        return (kind, key_of(loss)) in self._shared

    def add(self, kind: Hashable, loss: Any) -> None:
        alike = key_of(loss)
        if alike is not None and len(self._shared) < _LOSSES:
            self._shared.add((kind, alike))
        key = kind, id(loss)
        if loss is None:  # for what depends on none
            self._known[key] = lambda: None
            return
        try:
            self._known[key] = ref(loss, lambda _: self._known.pop(key, None))
        except TypeError:  # nothing refers to it weakly: it will be compared again
            return


class GraphInterpreter:
    """Runs a `Graph`.

    A point is the values of the nodes at given parameters and inputs: first those that lead to
    the outputs (`forward`), then, once the loss has given the cotangent u of the outputs, those
    of the backward pass (`backward`). Tangents in K directions follow the same two stages
    (`jvp`, `vjp_tangent`).

    Attributes:
        graph: what it runs.
        checked: kinds of results that were compared with another way, for which losses.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        backward = _after(graph.nodes, {graph.u})
        self.forward_nodes = [n for n in graph.nodes if n not in backward]
        self.backward_nodes = [n for n in graph.nodes if n in backward]
        norms = find_forward_regions(self.forward_nodes)
        self._forward_regions = _scheduled(self.forward_nodes, norms)
        self._backward_regions = _scheduled(
            self.backward_nodes, find_backward_regions(self.backward_nodes, norms)
        )
        self._affine = any(_has_constant_term(n, {graph.u, *backward}) for n in self.backward_nodes)
        self._last_forward = _last_uses(self._forward_regions, {graph.outputs})
        self._last_backward = _last_uses(self._backward_regions, set(graph.gradients))
        self.checked = VerifiedLosses()

    # -- values ----------------------------------------------------------------------------

    def forward(self, parts: Sequence[Tensor], buffers: Iterable[Tensor], x: Tree) -> PrimalValues:
        """Values of the nodes that lead to the outputs."""
        values = PrimalValues(self)
        values.update(zip(self.graph.parameters, parts, strict=True))
        values.update(zip(self.graph.buffers, buffers, strict=True))
        for node, leaf in zip(self.graph.x, trees.leaves(x), strict=True):
            values[node] = (
                convolution.packed(leaf) if leaf.ndim == 4 and leaf.is_floating_point() else leaf
            )
        self._evaluate(self._forward_regions, values)
        return values

    def backward(self, values: PrimalValues, u: Tensor) -> None:
        """Add the values of the backward pass."""
        values[self.graph.u] = u
        self._evaluate(self._backward_regions, values)

    def _evaluate(self, regions: Sequence[FusedRegion], values: PrimalValues) -> None:
        for region in regions:
            if isinstance(region, NormActForward | NormActBackward):
                region.evaluate(values)
            else:
                _run(region.nodes[0], values, self.graph.constants)

    # -- tangents --------------------------------------------------------------------------

    def jvp(
        self,
        values: PrimalValues,
        directions: Sequence[Tensor | None],
        *,
        keep: bool = False,
        terms: SecondOrderSum | None = None,
    ) -> Tangents:
        """Tangents of the nodes that lead to the outputs.

        Args:
            directions: tangents of the parameters.  # [K, *shape] each
            keep: keep all tangents, for `vjp_tangent`; otherwise only the outputs'.
            terms: where to add second-order forms of nodes that are not linear.
        """
        tangents: Tangents = dict(zip(self.graph.parameters, directions, strict=True))
        for region in self._forward_regions:
            self._take(region, values, tangents, terms)
            if not keep:
                for dead in self._last_forward.get(region, ()):
                    tangents.pop(dead, None)
        return tangents

    def vjp_tangent(
        self, values: PrimalValues, tangents: Tangents, u: Tensor
    ) -> list[Tensor | None]:
        """Tangents of the gradients in the parameters, from those of u.  # [K, *shape] each

        What `tangents` holds is let go of where it has been used for the last time.
        Without `backward` values: of the backward pass at u = 0, in which it is linear.
        """
        if self._affine and self.graph.u not in values:
            self.backward(values, torch.zeros_like(u[0]))
        tangents[self.graph.u] = u
        held = values if self.graph.u in values else _AtZero(values)
        for region in self._backward_regions:
            if isinstance(region, NormActBackward):
                region.run(held, tangents)
            else:
                self._one(region.nodes[0], held, tangents)
            for dead in self._last_backward.get(region, ()):
                tangents.pop(dead, None)
        return [tangents.get(node) for node in self.graph.gradients]

    def second_order_terms(
        self, values: PrimalValues, directions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """The outputs' tangents [K, n, ...], and the network's part of v^T H v [K] float64."""
        found = SecondOrderSum()
        tangents = self.jvp(values, directions, terms=found)
        some = next(d for d in directions if d is not None)
        return tangents.get(self.graph.outputs), found.total(len(some), some.device)

    def _take(
        self,
        region: FusedRegion,
        values: Any,
        tangents: Tangents,
        terms: SecondOrderSum | None = None,
    ) -> None:
        """Set a region's tangents, and add its second-order form, if asked for and there is one."""
        if isinstance(region, NormActForward):
            cotangent = None if terms is None else self.graph.cotangents.get(region.result)
            region.run(values, tangents, None if cotangent is None else values[cotangent], terms)
        else:
            self._one(region.nodes[0], values, tangents, terms)

    def _one(
        self, node: fx.Node, values: Any, tangents: Tangents, terms: SecondOrderSum | None = None
    ) -> None:
        if node.target is operator.getitem:
            whole = tangents.get(node.args[0])  # type: ignore[arg-type]
            if whole is not None:
                tangents[node] = whole[node.args[1]]
            return
        ctx = NodeContext(node, values, tangents)
        like = node.meta.get("val")
        if not ctx.active or (isinstance(like, Tensor) and not like.is_floating_point()):
            return
        if terms is not None:
            cotangents = self._cotangents(node)
            if cotangents:
                found = second_order_term(ctx, {i: values[n] for i, n in cotangents.items()})
                if found is not None:
                    terms.add(found)
        tangents[node] = tangent(ctx)

    def _cotangents(self, node: fx.Node) -> dict[int, fx.Node]:
        """Cotangents of a node's results, by number; none for a node that is linear."""
        known = self.graph.cotangents
        if node in known:
            return {0: known[node]}
        results = [user for user in node.users if user.target is operator.getitem]
        return {user.args[1]: known[user] for user in results if user in known}  # type: ignore[misc]


class _AtZero(Mapping[fx.Node, Any]):
    """Values, with those of a backward pass without constant terms where u is 0: all 0."""

    def __init__(self, values: PrimalValues) -> None:
        self._values, self.derived = values, values.derived

    def __getitem__(self, node: fx.Node) -> Any:
        if node in self._values:
            return self._values[node]
        return tree_map(
            lambda like: torch.zeros(like.shape, dtype=like.dtype, device=like.device),
            node.meta["val"],
        )

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _run(node: fx.Node, values: PrimalValues, constants: dict[str, Tensor]) -> None:
    if node.op == "get_attr":
        values[node] = constants[node.name]
    elif node.target in _REPLACEMENTS:
        values[node] = _REPLACEMENTS[node.target](NodeContext(node, values, {}))
    else:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = node.target(*args, **kwargs)


# Operations that aten does not do, or not on tensors with channels last.
_REPLACEMENTS: dict[Any, Any] = {
    aten.view.default: lambda ctx: ctx.value(0).reshape(ctx.argument(1)),
    aten.native_batch_norm_backward.default: batch_norm.backward,
    aten.convolution_backward.default: convolution.backward,
}


def _after(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found - sources


def _has_constant_term(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a node of the backward pass need not be 0 where u is: it joins u and constants."""
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


def _scheduled(nodes: Sequence[fx.Node], chains: Sequence[FusedRegion]) -> list[FusedRegion]:
    """Units of all nodes, in an order in which they can be taken."""
    owner: dict[fx.Node, FusedRegion] = {node: region for region in chains for node in region.nodes}
    for node in nodes:
        owner.setdefault(node, SingleNode(node))
    place = {node: i for i, node in enumerate(nodes)}
    regions = {id(region): region for region in owner.values()}
    waits = {
        key: {id(owner[a]) for a in region.inputs if a in owner and owner[a] is not region}
        for key, region in regions.items()
    }
    frees: dict[int, list[int]] = {}
    for key, before in waits.items():
        for one in before:
            frees.setdefault(one, []).append(key)
    rank = {key: min(place[node] for node in region.nodes) for key, region in regions.items()}
    ready = [(rank[key], key) for key, before in waits.items() if not before]
    heapq.heapify(ready)
    order: list[FusedRegion] = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(regions[key])
        for later in frees.get(key, ()):
            waits[later].discard(key)
            if not waits[later]:
                heapq.heappush(ready, (rank[later], later))
    assert len(order) == len(regions)
    return order


def _last_uses(
    regions: Sequence[FusedRegion], kept: set[fx.Node]
) -> dict[FusedRegion, list[fx.Node]]:
    """Nodes, but those that are kept, by the region that is the last to make or read them."""
    last: dict[fx.Node, FusedRegion] = {}
    for region in regions:
        for node in (*region.inputs, *region.nodes):
            last[node] = region
    by_region: dict[FusedRegion, list[fx.Node]] = {}
    for node, region in last.items():
        if node in kept:
            continue
        by_region.setdefault(region, []).append(node)
    return by_region
