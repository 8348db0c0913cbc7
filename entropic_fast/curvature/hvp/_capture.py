"""Capture of a network and of its backward pass as one graph of aten operations.

Whatever cannot be captured faithfully raises `GraphCaptureError`, and the caller falls back to
autograd. See "Capture" in docs/design/hvp.md.
"""

from __future__ import annotations

import importlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, vjp
from torch.nn.modules import module as _modules
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from ..._torch.full_precision import full_precision
from ..._torch.tracing import graph_of, told_of_tracing
from ..._utils import trees
from ..._utils.trees import Tree
from ...objective import Objective
from ...ops.random_bits import streams as random
from .._crosscheck import AGREEMENT, outputs_and_dtype
from ._capture_checks import GraphCaptureError, TraceGuard, is_linear, require_nothing_hidden
from ._decompositions import DECOMPOSITIONS

logger = logging.getLogger(__name__)
aten = torch.ops.aten
# Bytes of parameters and of values that are not linear in them, attention scores among them, from
# which on the backward pass is traced by shapes alone: slower for small graphs, but no value is
# computed.
LARGE = 2**27


@dataclass(frozen=True)
class Graph:
    """A network and its backward pass, for inputs of one shape.

    Attributes:
        nodes: in topological order.
        parameters, buffers, x, u: its placeholders; x has one per tensor of the inputs, and u is
            the cotangent of the outputs.
        gradients: of <outputs, u> in each parameter; None where it is 0.
        cotangents: of each node that is not linear in its active arguments.
        constants: tensors of the model other than parameters and buffers, by node name.
    """

    nodes: list[fx.Node]
    parameters: list[fx.Node]
    buffers: list[fx.Node]
    x: list[fx.Node]
    u: fx.Node
    outputs: fx.Node
    gradients: list[fx.Node]
    cotangents: dict[fx.Node, fx.Node]
    constants: dict[str, Tensor]


@full_precision()
def capture(obj: Objective, theta: Tensor, inputs: Tree) -> Graph:
    """The graph of an objective's model for inputs like these [n, ...]."""
    with _without_observers():
        try:
            return _captured(obj, theta, inputs)
        except GraphCaptureError as why:
            if "_local_scalar_dense" not in str(why):  # other than a value read back to Python
                raise
            # A model may avoid reading values back if it is told that torch.compile traces it.
            try:
                return _captured(obj, theta, inputs, told_of_tracing())
            except GraphCaptureError:
                raise why from None


def _captured(
    obj: Objective, theta: Tensor, inputs: Tree, told: AbstractContextManager[None] | None = None
) -> Graph:
    with _as_capture_errors(), told or nullcontext():
        require_nothing_hidden(obj, theta, inputs)
        parts = [part.detach() for part in obj.split(theta).values()]
        forward = _forward(obj, parts, inputs)
    _require_faithful(forward, obj, theta, inputs)
    marked = _not_linear(forward, len(parts))
    with _as_capture_errors():
        held = list(obj.buffers.values())
        return _with_backward(forward, marked, parts, held, trees.leaves(inputs))


@contextmanager
def _without_observers() -> Iterator[None]:
    """Suspend dispatch modes and module trackers, such as those of torch's FLOP counter.

    They are not part of the model, whose graph is kept for calls without them.
    """
    places: Any = (_modules._global_forward_pre_hooks, _modules._global_forward_hooks)
    followed = []
    for hooks in places:
        owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        tracking = {key for key, owner in owners.items() if isinstance(owner, ModuleTracker)}
        followed.append((hooks, {key: hook for key, hook in hooks.items() if key in tracking}))
    with _disable_current_modes():
        for hooks, trackers in followed:
            for key in trackers:
                hooks.pop(key, None)
        try:
            yield
        finally:
            for hooks, trackers in followed:
                hooks.update(trackers)
                for key in sorted(hooks):  # in the order in which they were registered
                    hooks.move_to_end(key)


@contextmanager
def _as_capture_errors() -> Iterator[None]:
    """Turn any error of tracing into a GraphCaptureError."""
    try:
        yield
    except (GraphCaptureError, torch.OutOfMemoryError):
        raise
    except Exception as why:
        said = (str(why) or "no message").splitlines()[0]
        raise GraphCaptureError(f"{type(why).__name__}: {said}") from why


@torch.no_grad()
def _require_faithful(forward: fx.GraphModule, obj: Objective, theta: Tensor, inputs: Tree) -> None:
    """Reject a graph that holds values of this point as constants."""
    # At another point, 10 % away, and on changed inputs: constants of this one would show.
    signs = random.rademacher(theta.shape, 0, dtype=theta.dtype, device=theta.device)
    theta = signs.mul_(0.1).add_(1).mul_(theta)
    inputs = trees.mapped(lambda t: (0.9 * t if t.is_floating_point() else t).flip(0), inputs)
    try:
        expected, dtype = outputs_and_dtype(obj, theta, inputs)
    except Exception:  # the model need not be defined there
        return
    leaves = (*obj.split(theta).values(), *obj.buffers.values(), *trees.leaves(inputs))
    (got,) = tree_leaves(fx.Interpreter(forward).run(*leaves, enable_io_processing=False))
    gap, scale = float((got - expected).nan_to_num().norm()), float(expected.nan_to_num().norm())
    if got.shape != expected.shape or not gap <= AGREEMENT[dtype][0] * scale:
        raise GraphCaptureError("the graph holds values of one point as constants")


def _forward(obj: Objective, parts: list[Tensor], inputs: Tree) -> fx.GraphModule:
    """The graph (parameters, buffers, x) -> outputs."""
    # Parameters, buffers and inputs are arguments, so that one graph serves any point and tile.
    names, buffers = obj.parameter_names, list(obj.buffers)

    def run(parts: Sequence[Tensor], held: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        values = dict(zip(names, parts, strict=True)) | dict(zip(buffers, held, strict=True))
        with TraceGuard():
            outputs = obj.run_model(values, trees.rebuilt(inputs, x))
        return outputs

    with torch.enable_grad():
        graph = _traced(
            run, DECOMPOSITIONS, parts, list(obj.buffers.values()), trees.leaves(inputs)
        )
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if _has_sizes_from_data(node):
            raise GraphCaptureError(f"sizes depend on the data ({node.target})")
    return graph


def _has_sizes_from_data(node: fx.Node) -> bool:
    if node.target is aten.index.Tensor:
        chosen = [a.meta["val"].dtype for a in node.args[1] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
        return torch.bool in chosen or torch.uint8 in chosen
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _with_backward(
    forward: fx.GraphModule,
    marked: list[fx.Node],
    parts: list[Tensor],
    buffers: list[Tensor],
    inputs: list[Tensor],
) -> Graph:
    """The forward graph and its derivatives in the parameters and at the marked nodes.

    A cotangent is the gradient in a shift of 0 that is added to a marked node.
    """
    joint = _joint_graph(forward, marked, parts, buffers, inputs)
    _join_constants(joint)
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    # Placeholders come in the order of `run` in `_joint_graph`; shifts follow u.
    p, b, i = len(parts), len(buffers), len(inputs)
    _remove_shifts(placeholders[p + b + i + 1 :])
    (result,) = (node for node in joint.graph.nodes if node.op == "output")
    leaves = iter(tree_leaves(result.args))
    outputs = next(leaves)
    gradients = [next(leaves) for _ in range(p)]
    cotangents = [next(leaves) for _ in marked]
    # A cotangent belongs to the node without its shift, which is the one that stays.
    unshifted = [next(leaves) for _ in marked]
    joint.graph.eliminate_dead_code()
    constants = {n.name: getattr(joint, n.target) for n in joint.graph.nodes if n.op == "get_attr"}
    # A kept graph must not keep the module, and with it the model's tensors, alive.
    joint.graph.owning_module = None
    return Graph(
        nodes=[n for n in joint.graph.nodes if n.op not in ("placeholder", "output")],
        parameters=placeholders[:p],
        buffers=placeholders[p : p + b],
        x=placeholders[p + b : p + b + i],
        u=placeholders[p + b + i],
        outputs=outputs,
        gradients=gradients,
        cotangents=dict(zip(unshifted, cotangents, strict=True)),
        constants=constants,
    )


def _join_constants(graph: fx.GraphModule) -> None:
    """Have one node for each constant tensor, by which regions recognize their own."""
    first: dict[Any, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])


def _joint_graph(
    forward: fx.GraphModule,
    marked: list[fx.Node],
    parts: list[Tensor],
    buffers: list[Tensor],
    inputs: list[Tensor],
) -> fx.GraphModule:
    """(parameters, buffers, x, u, shifts) -> outputs, gradients, cotangents, unshifted nodes."""
    likes = [node.meta["val"] for node in marked]  # which hold no data
    # In the dtype of the node: a model may compute parts of itself in another one.
    shifts = [torch.zeros(like.shape, dtype=like.dtype, device=like.device) for like in likes]
    # Values do not matter to the trace: zeros stand for u and the shifts.
    (outputs,) = tree_leaves(next(n for n in forward.graph.nodes if n.op == "output").args)
    like = outputs.meta["val"]
    u = torch.zeros(like.shape, dtype=like.dtype, device=like.device)

    def run(
        parts: list[Tensor], buffers: list[Tensor], x: list[Tensor], u: Tensor, shifts: list[Tensor]
    ) -> Any:
        def network(parts: list[Tensor], shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            return _Shifted(forward, marked).run(parts, buffers, x, shifts)

        outputs, pullback, unshifted = vjp(network, parts, shifts, has_aux=True)
        gradients, cotangents = pullback(u)
        return outputs, gradients, cotangents, unshifted

    arguments = parts, buffers, inputs, u, shifts
    if sum(like.numel() * like.element_size() for like in (*likes, *parts)) > LARGE:
        try:
            return _traced(run, DECOMPOSITIONS, *arguments, without_values=True)
        except Exception as why:  # an operation without a meta kernel
            logger.info("the backward pass is traced with values: %s", why)
    return _traced(run, DECOMPOSITIONS, *arguments)


def _remove_shifts(shifts: Sequence[fx.Node]) -> None:
    for shift in shifts:
        for add in list(shift.users):
            others = [a for a in add.all_input_nodes if a is not shift]
            # Elsewhere a shift is read only by a derivative that the model itself computes.
            if add.target is not aten.add.Tensor or len(others) != 1:
                raise GraphCaptureError("the model takes derivatives of its own")
            add.replace_all_uses_with(others[0])


def _traced(
    function: Callable[..., Any], table: Any, *arguments: Any, without_values: bool = False
) -> fx.GraphModule:
    with warnings.catch_warnings():  # from torch's own tracing code
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        importlib.import_module("torch._decomp.decompositions_for_jvp")  # for forward mode
        # ResNet-20 takes 0.3 s on one CPU core: interpreters are cached by architecture.
        options = {"decompositions": table, "without_values": without_values}
        graph = graph_of(function, *arguments, **options)
        if any(_mutates(node) for node in graph.graph.nodes):
            # A second trace: only the first shows what composite functions change in place.
            graph = graph_of(functionalize(graph), *arguments, **options)
    for node in graph.graph.nodes:
        if _mutates(node):
            raise GraphCaptureError(f"the graph changes a tensor in place ({node.target})")
        if any(isinstance(t, Tensor) and t.is_complex() for t in tree_leaves(node.meta.get("val"))):
            raise GraphCaptureError(f"the model computes with complex numbers ({node.target})")
    return graph


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _not_linear(forward: fx.GraphModule, count: int) -> list[fx.Node]:
    """Tensor nodes of the graph that are not linear in their active arguments.

    Active are the first `count` placeholders, the parameters, and what depends on them.
    """
    active: set[fx.Node] = set()
    marked = []
    for node in forward.graph.nodes:
        if node.op == "placeholder":
            if count > 0:
                active.add(node)
                count -= 1
            continue
        if node.op != "call_function" or not any(a in active for a in node.all_input_nodes):
            continue
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            continue
        # Nothing here requires gradients, so torch itself inserts no `detach`.
        if node.target is aten.detach.default:
            raise GraphCaptureError("the model detaches a tensor")
        active.add(node)
        source = node.args[0] if node.target is operator.getitem else node
        # A linear node needs no cotangent: its second-order term is 0. A batched product may end
        # attention, whose term is taken there even where V is constant.
        ends = node.target is aten.bmm.default
        if isinstance(value, Tensor) and (ends or not is_linear(source, active)):
            marked.append(node)
    return marked


class _Shifted(fx.Interpreter):
    """The forward graph with shifts added to marked nodes, which also returns these unshifted."""

    def __init__(self, forward: fx.GraphModule, marked: list[fx.Node]) -> None:
        super().__init__(forward, garbage_collect_values=True)
        self._marked = {node: i for i, node in enumerate(marked)}

    def run(  # type: ignore[override]
        self, parts: list[Tensor], buffers: list[Tensor], x: list[Tensor], shifts: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        self._shifts, self._unshifted = shifts, list(shifts)
        outputs = super().run(*parts, *buffers, *x, enable_io_processing=False)
        (outputs,) = tree_leaves(outputs)
        return outputs, self._unshifted

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self._marked:
            i = self._marked[node]
            self._unshifted[i] = value
            return value + self._shifts[i]
        return value
