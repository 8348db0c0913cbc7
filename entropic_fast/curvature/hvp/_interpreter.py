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
from ._fusion import BackUnit, NormUnit, Unit, back_units, norm_units
from ._jvp_rules import tangent
from ._node import FormSum, Step
from ._second_order_terms import form

aten = torch.ops.aten
Tangents = dict[fx.Node, Any]


class Values(dict[fx.Node, Any]):
    """Values of nodes at a point, and the program that made them.

    Attributes:
        derived: what fused chains need of them, by node.
        read: nodes that tangents have asked for.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.derived: dict[fx.Node, Any] = {}
        self.read: set[fx.Node] = set()

    def __getitem__(self, node: fx.Node) -> Any:
        self.read.add(node)
        return super().__getitem__(node)

    def prune(self) -> int:
        """Let go of what tangents have not read; the bytes of the rest."""
        placed = {*self.program.graph.parameters, *self.program.graph.buffers}
        for node in self.keys() - self.read - placed - {self.program.graph.u}:
            del self[node]
        held = [value for node, value in self.items() if node not in placed]
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaf in tree_leaves((held, list(self.derived.values())))
            if isinstance(leaf, Tensor)
        }
        return sum(storages.values())


_LOSSES = 256  # that models of an architecture share, at most


class Checked:
    """Kinds of results and the losses for which they were compared; keeps no loss alive.

    Losses that compute the same are one for all models of an architecture.

    >>> checked, loss = Checked(), torch.nn.MSELoss()
    >>> checked.add("hessian", loss)
    >>> ("hessian", loss) in checked, ("ggn", loss) in checked
    (True, False)
    """

    def __init__(self, shared: set[Hashable] | None = None) -> None:
        self._known: dict[tuple[Hashable, int], Any] = {}
        self._shared: set[Hashable] = set() if shared is None else shared

    def for_another_model(self) -> Checked:
        """What is known for the losses of another model of the same architecture."""
        return Checked(self._shared)

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


class Program:
    """Runs a `Graph`.

    A point is the values of the nodes at given parameters and inputs: first those that lead to
    the outputs (`forward`), then, once the loss has given the cotangent u of the outputs, those
    of the backward pass (`backward`). Tangents in K directions follow the same two stages
    (`push`, `pull`).

    Attributes:
        graph: what it runs.
        checked: kinds of results that were compared with another way, for which losses.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        behind = _after(graph.nodes, {graph.u})
        self.ahead = [n for n in graph.nodes if n not in behind]
        self.behind = [n for n in graph.nodes if n in behind]
        norms = norm_units(self.ahead)
        self._units_ahead = _scheduled(self.ahead, norms)
        self._units_behind = _scheduled(self.behind, back_units(self.behind, norms))
        self._affine = any(_has_constant_term(n, {graph.u, *behind}) for n in self.behind)
        self._last = _last_uses(self._units_ahead, {graph.outputs})
        self._last_behind = _last_uses(self._units_behind, set(graph.gradients))
        self.checked = Checked()

    # -- values ----------------------------------------------------------------------------

    def forward(self, parts: Sequence[Tensor], buffers: Iterable[Tensor], x: Tree) -> Values:
        """Values of the nodes that lead to the outputs."""
        values = Values(self)
        values.update(zip(self.graph.parameters, parts, strict=True))
        values.update(zip(self.graph.buffers, buffers, strict=True))
        for node, leaf in zip(self.graph.x, trees.leaves(x), strict=True):
            values[node] = (
                convolution.packed(leaf) if leaf.ndim == 4 and leaf.is_floating_point() else leaf
            )
        self._evaluate(self._units_ahead, values)
        return values

    def backward(self, values: Values, u: Tensor) -> None:
        """Add the values of the backward pass."""
        values[self.graph.u] = u
        self._evaluate(self._units_behind, values)

    def _evaluate(self, units: Sequence[Unit], values: Values) -> None:
        for unit in units:
            if isinstance(unit, NormUnit | BackUnit):
                unit.evaluate(values)
            else:
                _run(unit.nodes[0], values, self.graph.constants)

    # -- tangents --------------------------------------------------------------------------

    def push(
        self,
        values: Values,
        directions: Sequence[Tensor | None],
        *,
        keep: bool = False,
        forms: FormSum | None = None,
    ) -> Tangents:
        """Tangents of the nodes that lead to the outputs.

        Args:
            directions: tangents of the parameters.  # [K, *shape] each
            keep: keep all tangents, for `pull`; otherwise only the outputs'.
            forms: where to add second-order forms of nodes that are not linear.
        """
        tangents: Tangents = dict(zip(self.graph.parameters, directions, strict=True))
        for unit in self._units_ahead:
            self._take(unit, values, tangents, forms)
            if not keep:
                for dead in self._last.get(unit, ()):
                    tangents.pop(dead, None)
        return tangents

    def pull(self, values: Values, tangents: Tangents, u: Tensor) -> list[Tensor | None]:
        """Tangents of the gradients in the parameters, from those of u.  # [K, *shape] each

        What `tangents` holds is let go of where it has been used for the last time.
        Without `backward` values: of the backward pass at u = 0, in which it is linear.
        """
        if self._affine and self.graph.u not in values:
            self.backward(values, torch.zeros_like(u[0]))
        tangents[self.graph.u] = u
        held = values if self.graph.u in values else _AtZero(values)
        for unit in self._units_behind:
            if isinstance(unit, BackUnit):
                unit.run(held, tangents)
            else:
                self._one(unit.nodes[0], held, tangents)
            for dead in self._last_behind.get(unit, ()):
                tangents.pop(dead, None)
        return [tangents.get(node) for node in self.graph.gradients]

    def forms(
        self, values: Values, directions: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """The outputs' tangents [K, n, ...], and the network's part of v^T H v [K] float64."""
        found = FormSum()
        tangents = self.push(values, directions, forms=found)
        some = next(d for d in directions if d is not None)
        return tangents.get(self.graph.outputs), found.total(len(some), some.device)

    def _take(
        self, unit: Unit, values: Any, tangents: Tangents, forms: FormSum | None = None
    ) -> None:
        """Set a unit's tangents, and add its second-order form, if asked for and there is one."""
        if isinstance(unit, NormUnit):
            cotangent = None if forms is None else self.graph.cotangents.get(unit.result)
            unit.run(values, tangents, None if cotangent is None else values[cotangent], forms)
        else:
            self._one(unit.nodes[0], values, tangents, forms)

    def _one(
        self, node: fx.Node, values: Any, tangents: Tangents, forms: FormSum | None = None
    ) -> None:
        if node.target is operator.getitem:
            whole = tangents.get(node.args[0])  # type: ignore[arg-type]
            if whole is not None:
                tangents[node] = whole[node.args[1]]
            return
        step = Step(node, values, tangents)
        like = node.meta.get("val")
        if not step.moving or (isinstance(like, Tensor) and not like.is_floating_point()):
            return
        if forms is not None:
            cotangents = self._cotangents(node)
            if cotangents:
                found = form(step, {i: values[n] for i, n in cotangents.items()})
                if found is not None:
                    forms.add(found)
        tangents[node] = tangent(step)

    def _cotangents(self, node: fx.Node) -> dict[int, fx.Node]:
        """Cotangents of a node's results, by number; none for a node that is linear."""
        known = self.graph.cotangents
        if node in known:
            return {0: known[node]}
        results = [user for user in node.users if user.target is operator.getitem]
        return {user.args[1]: known[user] for user in results if user in known}  # type: ignore[misc]


class _AtZero(Mapping[fx.Node, Any]):
    """Values, with those of a backward pass without constant terms where u is 0: all 0."""

    def __init__(self, values: Values) -> None:
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


def _run(node: fx.Node, values: Values, constants: dict[str, Tensor]) -> None:
    if node.op == "get_attr":
        values[node] = constants[node.name]
    elif node.target in _OWN:
        values[node] = _OWN[node.target](Step(node, values, {}))
    else:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = node.target(*args, **kwargs)


# Operations that aten does not do, or not on tensors with channels last.
_OWN: dict[Any, Any] = {
    aten.view.default: lambda step: step.value(0).reshape(step.argument(1)),
    aten.native_batch_norm_backward.default: batch_norm.backward,
    aten.convolution_backward.default: convolution.backward,
}


def _after(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found - sources


def _has_constant_term(node: fx.Node, behind: set[fx.Node]) -> bool:
    """Whether a node of the backward pass need not be 0 where u is: it joins u and constants."""
    if node.target not in _JOINING:
        return False
    return any(
        a not in behind and a.meta["val"].is_floating_point() and not _is_zero(a)
        for a in node.all_input_nodes
    )


def _is_zero(node: fx.Node) -> bool:
    if node.target is aten.scalar_tensor.default:
        return bool(node.args[0] == 0)
    return node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


_JOINING = {
    aten.cat.default, aten.stack.default, aten.add.Tensor, aten.sub.Tensor, aten.where.self,
}  # fmt: skip


class _Single(Unit):
    def __init__(self, node: fx.Node) -> None:
        self.nodes = (node,)


def _scheduled(nodes: Sequence[fx.Node], chains: Sequence[Unit]) -> list[Unit]:
    """Units of all nodes, in an order in which they can be taken."""
    owner: dict[fx.Node, Unit] = {node: unit for unit in chains for node in unit.nodes}
    for node in nodes:
        owner.setdefault(node, _Single(node))
    place = {node: i for i, node in enumerate(nodes)}
    units = {id(unit): unit for unit in owner.values()}
    waits = {
        key: {id(owner[a]) for a in unit.inputs if a in owner and owner[a] is not unit}
        for key, unit in units.items()
    }
    frees: dict[int, list[int]] = {}
    for key, before in waits.items():
        for one in before:
            frees.setdefault(one, []).append(key)
    rank = {key: min(place[node] for node in unit.nodes) for key, unit in units.items()}
    ready = [(rank[key], key) for key, before in waits.items() if not before]
    heapq.heapify(ready)
    order: list[Unit] = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(units[key])
        for later in frees.get(key, ()):
            waits[later].discard(key)
            if not waits[later]:
                heapq.heappush(ready, (rank[later], later))
    assert len(order) == len(units)
    return order


def _last_uses(units: Sequence[Unit], kept: set[fx.Node]) -> dict[Unit, list[fx.Node]]:
    """Nodes, but those that are kept, by the unit that is the last to make or read them."""
    last: dict[fx.Node, Unit] = {}
    for unit in units:
        for node in (*unit.inputs, *unit.nodes):
            last[node] = unit
    by_unit: dict[Unit, list[fx.Node]] = {}
    for node, unit in last.items():
        if node in kept:
            continue
        by_unit.setdefault(unit, []).append(node)
    return by_unit
