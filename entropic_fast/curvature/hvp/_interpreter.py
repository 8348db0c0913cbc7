"""Values, tangents and second-order terms of a captured network."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from ..._utils import trees
from ..._utils.trees import Tree
from .._crosscheck import VerifiedLosses
from . import _convolution as convolution
from ._capture import Graph
from ._capture_checks import PIECEWISE
from ._fusion import FusedRegion, find_norm_acts
from ._jvp_rules import tangent
from ._node import NodeContext, SecondOrderSum
from ._schedule import (
    SingleNode,
    depends_on,
    has_constant_term,
    last_uses,
    scheduled,
    unread,
)
from ._second_order_terms import second_order_term
from .transformer._attention import AttentionForward
from .transformer._attention_pattern import find_attention
from .transformer._layer_norm import find_layer_norms

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]
# Each finds regions of both passes; a node is in one region at most.
FUSIONS: tuple[Any, ...] = (find_norm_acts, find_layer_norms, find_attention)


class PrimalValues(dict[fx.Node, Any]):
    """Values of nodes at a point, and the interpreter that computed them.

    `derived` is what fused regions need of them; `read` has the nodes that tangents have read.
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
        """Drop what no tangent has read; the bytes of the remainder."""
        graph = self.interpreter.graph
        inputs = {*graph.parameters, *graph.buffers}
        for node in self.keys() - self.read - inputs - {graph.u}:
            del self[node]
        held = [value for node, value in self.items() if node not in inputs]
        # Views share a storage, which counts once.
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaf in tree_leaves((held, list(self.derived.values())))
            if isinstance(leaf, Tensor)
        }
        return sum(storages.values())


class GraphInterpreter:
    """Evaluates a `Graph`, and differentiates it along K directions at once.

    A point is first the values of the nodes that lead to the outputs (`forward`) and then, once the
    loss has given the cotangent u of the outputs, those of the backward pass (`backward`). Tangents
    follow the same two passes (`jvp`, `vjp_tangent`).
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        backward = depends_on(graph.nodes, {graph.u})
        self.forward_nodes = [n for n in graph.nodes if n not in backward]
        self.backward_nodes = [n for n in graph.nodes if n in backward]
        fused = [find(self.forward_nodes, self.backward_nodes) for find in FUSIONS]
        self._forward_regions = scheduled(self.forward_nodes, [r for f, _ in fused for r in f])
        self._backward_regions = scheduled(self.backward_nodes, [r for _, b in fused for r in b])
        # Weight gradients at the point, a third of its cost.
        unneeded = unread(self.backward_nodes, {*graph.cotangents.values()})
        self._evaluated = [
            r for r in self._backward_regions
            if not (isinstance(r, SingleNode) and r.nodes[0] in unneeded)
        ]  # fmt: skip
        # Whether the backward pass joins u with constants, and so is not 0 at u = 0.
        self._affine = any(has_constant_term(n, {graph.u, *backward}) for n in self.backward_nodes)
        self._last_forward = last_uses(self._forward_regions, {graph.outputs})
        self._last_backward = last_uses(self._backward_regions, set(graph.gradients))
        self.checked = VerifiedLosses()

    @property
    def score_bytes(self) -> int:
        """Bytes of all attention scores of two examples, which the graph never holds at once."""
        scores = [
            r.attention.scores.meta["val"]
            for r in self._forward_regions
            if isinstance(r, AttentionForward)
        ]
        examples = max(1, len(self.graph.outputs.meta["val"]))
        return sum(2 * s.numel() * s.element_size() for s in scores) // examples

    @property
    def has_kinks(self) -> bool:
        """Whether an operation is not differentiable everywhere, such as a ReLU."""
        return any(node.target in PIECEWISE for node in self.forward_nodes)

    # -- values ----------------------------------------------------------------------------

    def forward(self, parts: Sequence[Tensor], buffers: Iterable[Tensor], x: Tree) -> PrimalValues:
        """Values of the nodes that lead to the outputs, for parameters, buffers and inputs."""
        values = PrimalValues(self)
        values.update(zip(self.graph.parameters, parts, strict=True))
        values.update(zip(self.graph.buffers, buffers, strict=True))
        for node, leaf in zip(self.graph.x, trees.leaves(x), strict=True):
            # Fused regions read images with channels last without a copy.
            is_images = leaf.ndim == 4 and leaf.is_floating_point()
            values[node] = convolution.packed(leaf) if is_images else leaf
        self._evaluate(self._forward_regions, values)
        return values

    def backward(self, values: PrimalValues, u: Tensor) -> None:
        """Add the values of the backward pass at the cotangent u that tangents read."""
        values[self.graph.u] = u
        self._evaluate(self._evaluated, values)

    def _evaluate(self, regions: Sequence[FusedRegion], values: PrimalValues) -> None:
        for region in regions:
            if isinstance(region, SingleNode):
                _run(region.nodes[0], values, self.graph.constants)
            else:
                region.evaluate(values)

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

        `directions` are tangents [K, *shape] of the parameters. All are kept for `vjp_tangent` if
        `keep`, otherwise only that of the outputs. Second-order terms of nodes that are not linear
        are added to `terms`.
        """
        tangents: Tangents = dict(zip(self.graph.parameters, directions, strict=True))
        for region in self._forward_regions:
            if isinstance(region, SingleNode):
                self._differentiate(region.nodes[0], values, tangents, terms)
            else:
                source = None if terms is None else self.graph.cotangents.get(region.result)
                cotangent = None if source is None else values[source]
                region.run(values, tangents, cotangent, terms)
            # Quadratic forms and Gauss-Newton products need the outputs' tangent alone.
            if not keep:
                for dead in self._last_forward.get(region, ()):
                    tangents.pop(dead, None)
        return tangents

    def vjp_tangent(
        self, values: PrimalValues, tangents: Tangents, u: Tensor
    ) -> list[Tensor | None]:
        """Tangents of the parameters' gradients, each [K, *shape], from those of u.

        Entries of `tangents` are dropped after their last use. Without values of the backward pass,
        the result is J^T u.
        """
        # The backward pass is linear in u, so its values at u = 0 are 0 and need not be computed.
        # Constant terms are not 0 at u = 0, and cached zeros would lose them.
        if self._affine and self.graph.u not in values:
            self.backward(values, torch.zeros_like(u[0]))
        tangents[self.graph.u] = u
        held = values if self.graph.u in values else _ZeroCotangent(values)
        for region in self._backward_regions:
            if isinstance(region, SingleNode):
                self._differentiate(region.nodes[0], held, tangents)
            else:
                region.run(held, tangents)
            for dead in self._last_backward.get(region, ()):
                tangents.pop(dead, None)
        return [tangents.get(node) for node in self.graph.gradients]

    def second_order_terms(
        self, values: PrimalValues, directions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """The tangent of the outputs [K, n, ...], and the network's share of v^T H v [K]."""
        # g of an operation has the effect of all later ones, so each term counts once.
        terms = SecondOrderSum()
        tangents = self.jvp(values, directions, terms=terms)
        some = next(d for d in directions if d is not None)
        return tangents.get(self.graph.outputs), terms.total(len(some), some.device)

    def _differentiate(
        self, node: fx.Node, values: Any, tangents: Tangents, terms: SecondOrderSum | None = None
    ) -> None:
        """Set the tangent of a node with active arguments, and add its second-order term."""
        if node.target is operator.getitem:
            results = tangents.get(node.args[0])  # type: ignore[arg-type]
            if results is not None:
                tangents[node] = results[node.args[1]]
            return
        ctx = NodeContext(node, values, tangents)
        like = node.meta.get("val")
        # Integers, such as the places of maxima, have no tangent.
        if not ctx.active or (isinstance(like, Tensor) and not like.is_floating_point()):
            return
        if terms is not None:
            cotangents = self._cotangents(node)
            if cotangents:
                term = second_order_term(ctx, {i: values[n] for i, n in cotangents.items()})
                if term is not None:
                    terms.add(term)
        tangents[node] = tangent(ctx)

    def _cotangents(self, node: fx.Node) -> dict[int, fx.Node]:
        """Cotangents of a node's results, by number; none for a linear node."""
        by_node = self.graph.cotangents
        if node in by_node:
            return {0: by_node[node]}
        # An operation with several results has a cotangent for each that is read.
        results = [user for user in node.users if user.target is operator.getitem]
        return {user.args[1]: by_node[user] for user in results if user in by_node}  # type: ignore[misc]


class _ZeroCotangent(Mapping[fx.Node, Any]):
    """Values, with zeros for those of the backward pass, which it has at u = 0."""

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


# Channels last: `view` fails on such strides. Aten's backward pass of batch normalization, which is
# wrong for a single image (2.13 to 2.15, CPU), is always part of a region.
_REPLACEMENTS: dict[Any, Any] = {
    aten.view.default: lambda ctx: ctx.value(0).reshape(ctx.argument(1)),
    aten.convolution.default: convolution.forward,
    aten.convolution_backward.default: convolution.backward,
}
