"""Values, tangents and second-order forms of a captured network."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import batch_norm
from .capture import Graph
from .convolution import _packed
from .forms import form
from .rules import tangent
from .step import Step

aten = torch.ops.aten
Values = dict[fx.Node, Any]


class Program:
    """Runs a `Graph`.

    A point is the values of the nodes at given parameters and inputs: first those that lead to
    the outputs (`forward`), then, once the loss has given the cotangent u of the outputs, those
    of the backward pass (`backward`). Tangents in K directions follow the same two stages
    (`push`, `pull`). What a stage does not need of the one before is not kept.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        behind = _after(graph.nodes, {graph.u})
        self.ahead = [n for n in graph.nodes if n not in behind]
        self.behind = [n for n in graph.nodes if n in behind]

    # -- values ----------------------------------------------------------------------------

    def forward(self, parts: Sequence[Tensor], buffers: Iterable[Tensor], x: Tensor) -> Values:
        """Values of the nodes that lead to the outputs."""
        values: Values = dict(zip(self.graph.parameters, parts, strict=True))
        values |= dict(zip(self.graph.buffers, buffers, strict=True))
        values[self.graph.x] = _packed(x) if x.ndim == 4 else x
        _run(self.ahead, values, self.graph.constants)
        return values

    def backward(self, values: Values, u: Tensor) -> None:
        """Add the values of the backward pass."""
        values[self.graph.u] = u
        _run(self.behind, values, self.graph.constants)

    # -- tangents --------------------------------------------------------------------------

    def push(
        self,
        values: Values,
        directions: Sequence[Tensor | None],
        on_node: Callable[[Step], None] | None = None,
        keep: bool = False,
    ) -> Values:
        """Tangents of the nodes that lead to the outputs.

        Args:
            directions: tangents of the parameters.  # [K, *shape] each
            on_node: called for every moving node, while its arguments' tangents are there.
            keep: keep all tangents, for `pull`; otherwise only the outputs'.
        """
        tangents: Values = dict(zip(self.graph.parameters, directions, strict=True))
        last = {} if keep else _last_uses(self.ahead)
        for node in self.ahead:
            step = Step(node, values, tangents)
            if not step.moving:
                continue
            if on_node is not None:
                on_node(step)
            tangents[node] = _tangent(step)
            for dead in last.get(node, ()):
                if dead is not self.graph.outputs:
                    tangents.pop(dead, None)
        return tangents

    def pull(self, values: Values, tangents: Values, u: Tensor | None) -> list[Tensor | None]:
        """Tangents of the gradients in the parameters, from those of u.  # [K, *shape] each"""
        if u is not None:
            tangents[self.graph.u] = u
        for node in self.behind:
            step = Step(node, values, tangents)
            if step.moving:
                tangents[node] = _tangent(step)
        return [tangents.get(node) for node in self.graph.gradients]

    def forms(
        self, values: Values, directions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """The outputs' tangents [K, n, ...], and the network's part of v^T H v [K] float64."""
        found: list[Tensor] = []

        def look(step: Step) -> None:
            cotangents = self._cotangents(step.node)
            if cotangents:
                one = form(step, {i: values[node] for i, node in cotangents.items()})
                if one is not None:
                    found.append(one)

        tangents = self.push(values, directions, look)
        k = next(len(d) for d in directions if d is not None)
        total = values[self.graph.x].new_zeros(k, dtype=torch.float64)
        for one in found:
            total += one
        return tangents.get(self.graph.outputs), total

    def _cotangents(self, node: fx.Node) -> dict[int, fx.Node]:
        """Cotangents of a node's results, by number; none for a node that is linear."""
        known = self.graph.cotangents
        if node.target is operator.getitem:
            return {}
        if node in known:
            return {0: known[node]}
        results = [user for user in node.users if user.target is operator.getitem]
        return {user.args[1]: known[user] for user in results if user in known}  # type: ignore[misc]


def _tangent(step: Step) -> Any:
    if step.node.target is operator.getitem:
        return step.tangent(0)[step.node.args[1]]
    value = step.result
    if isinstance(value, Tensor) and not value.is_floating_point():
        return None
    return tangent(step)


def _run(nodes: Iterable[fx.Node], values: Values, constants: dict[str, Tensor]) -> None:
    for node in nodes:
        if node.op == "get_attr":
            values[node] = constants[node.name]
        elif node.target in _OWN:
            values[node] = _OWN[node.target](Step(node, values, {}))
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*args, **kwargs)


# Operations that aten does not do, or not on tensors with channels last.
_OWN: dict[Any, Callable[[Step], Any]] = {
    aten.view.default: lambda step: step.value(0).reshape(step.argument(1)),
    aten.native_batch_norm_backward.default: batch_norm.backward,
}


def _after(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found - sources


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            last[used] = node
    by_node: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        by_node.setdefault(node, []).append(used)
    return by_node
