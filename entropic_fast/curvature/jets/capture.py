"""The graph of a network, and of its backward pass, as aten operations.

The model is run once under `make_fx`, which writes down the aten operations (after autograd and
composite functions have been taken apart) that lead from parameters, buffers and inputs to the
outputs. The written-down graph is then differentiated by autograd under `make_fx` again, which
writes down the backward pass. What cannot be captured faithfully (values read back to Python,
parts without gradient, functions with a backward pass of their own, hooks) raises
`NotCapturedError`; the caller then takes another way.
"""

from __future__ import annotations

import importlib
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call, functionalize, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...exact import exact_math
from ...objective import Objective
from .decompositions import DECOMPOSITIONS
from .linear import is_linear

aten = torch.ops.aten


class NotCapturedError(RuntimeError):
    """A model whose graph does not say all there is to its derivatives; the message says why."""


@dataclass(frozen=True)
class Graph:
    """A network and its backward pass, for inputs of one shape.

    The graph is a function of parameters, buffers, inputs x and cotangents u of the outputs.

    Attributes:
        nodes: in an order in which they can be computed.
        parameters, buffers, x, u: its placeholders.
        outputs: the network's outputs.
        gradients: of <outputs, u> in each parameter; None where it is 0.
        cotangents: of each node that is not linear in what depends on the parameters.
        constants: tensors that the model holds, by the name of their node.
    """

    nodes: list[fx.Node]
    parameters: list[fx.Node]
    buffers: list[fx.Node]
    x: fx.Node
    u: fx.Node
    outputs: fx.Node
    gradients: list[fx.Node]
    cotangents: dict[fx.Node, fx.Node]
    constants: dict[str, Tensor]


@exact_math()
def capture(obj: Objective, theta: Tensor, inputs: Tensor) -> Graph:
    """The graph of an objective's model for inputs like these [n, ...].

    Raises:
        NotCapturedError: see above.
    """
    _require_plain(obj._model)
    parts = [part.detach() for part in obj.split(theta).values()]
    forward = _forward(obj, parts, inputs)
    marked = _not_linear(forward, len(parts))
    return _with_backward(forward, marked, parts, list(obj.buffers.values()), inputs)


def _forward(obj: Objective, parts: list[Tensor], inputs: Tensor) -> fx.GraphModule:
    """The graph (parameters, buffers, x) -> outputs."""
    names, buffers = obj.parameter_names, list(obj.buffers)

    def run(parts: Sequence[Tensor], held: Sequence[Tensor], x: Tensor) -> Tensor:
        values = dict(zip(names, parts, strict=True)) | dict(zip(buffers, held, strict=True))
        with _Watch():
            outputs: Tensor = functional_call(obj._model, values, (x,), tie_weights=True)
        return outputs

    with torch.enable_grad():
        graph = _traced(run, DECOMPOSITIONS, parts, list(obj.buffers.values()), inputs)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if _has_sizes_from_data(node):
            raise NotCapturedError(f"sizes depend on the data ({node.target})")
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
    inputs: Tensor,
) -> Graph:
    """Differentiate the graph in the parameters, and in shifts (of 0) of the marked nodes."""
    shifts = []
    for node in marked:
        like = node.meta["val"]  # without data
        shifts.append(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
    outputs = _Shifted(forward, marked).run(parts, buffers, inputs, shifts)[0]

    def run(
        parts: list[Tensor], buffers: list[Tensor], x: Tensor, u: Tensor, shifts: list[Tensor]
    ) -> Any:
        def network(parts: list[Tensor], shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            return _Shifted(forward, marked).run(parts, buffers, x, shifts)

        outputs, pull, before = vjp(network, parts, shifts, has_aux=True)
        gradients, cotangents = pull(u)
        return outputs, gradients, cotangents, before

    arguments = (parts, buffers, inputs, torch.zeros_like(outputs), shifts)
    joint = _traced(run, {}, *arguments)
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    p, b = len(parts), len(buffers)
    for shift in placeholders[p + b + 2 :]:
        for add in list(shift.users):
            shifted = next(a for a in add.all_input_nodes if a is not shift)
            add.replace_all_uses_with(shifted)
    (result,) = (node for node in joint.graph.nodes if node.op == "output")
    leaves = iter(tree_leaves(result.args))
    outputs_node = next(leaves)
    gradients = [next(leaves) for _ in range(p)]
    cotangents = [next(leaves) for _ in marked]
    before = [next(leaves) for _ in marked]
    joint.graph.eliminate_dead_code()
    return Graph(
        nodes=[n for n in joint.graph.nodes if n.op not in ("placeholder", "output")],
        parameters=placeholders[:p],
        buffers=placeholders[p : p + b],
        x=placeholders[p + b],
        u=placeholders[p + b + 1],
        outputs=outputs_node,
        gradients=gradients,
        cotangents=dict(zip(before, cotangents, strict=True)),
        constants={
            n.name: getattr(joint, n.target) for n in joint.graph.nodes if n.op == "get_attr"
        },
    )


def _traced(function: Callable[..., Any], table: Any, *arguments: Any) -> fx.GraphModule:
    try:
        with warnings.catch_warnings():  # torch's own, of what it uses to trace
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            importlib.import_module("torch._decomp.decompositions_for_jvp")  # for forward mode
            graph = make_fx(function, decomposition_table=table)(*arguments)
            if any(_mutates(node) for node in graph.graph.nodes):
                # Only now, as composite functions hide what they change in place.
                graph = make_fx(functionalize(graph), decomposition_table=table)(*arguments)
    except NotCapturedError:
        raise
    except Exception as why:  # whatever a model does that tracing does not take
        raise NotCapturedError(f"{type(why).__name__}: {str(why).splitlines()[0]}") from why
    for node in graph.graph.nodes:
        if _mutates(node):
            raise NotCapturedError(f"the graph changes a tensor in place ({node.target})")
    return graph


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _not_linear(forward: fx.GraphModule, count: int) -> list[fx.Node]:
    """Nodes (tensors) of the graph that are not linear in what depends on the parameters."""
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
        active.add(node)
        source = node.args[0] if node.target is operator.getitem else node
        if isinstance(value, Tensor) and not is_linear(source, active):
            marked.append(node)
    return marked


class _Shifted(fx.Interpreter):
    """Runs the forward graph with something added to marked nodes."""

    def __init__(self, forward: fx.GraphModule, marked: list[fx.Node]) -> None:
        super().__init__(forward, garbage_collect_values=True)
        self._marked = {node: i for i, node in enumerate(marked)}

    def run(  # type: ignore[override]
        self, parts: list[Tensor], buffers: list[Tensor], x: Tensor, shifts: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        self._shifts, self._before = shifts, list(shifts)
        outputs = super().run(*parts, *buffers, x, enable_io_processing=False)
        (outputs,) = tree_leaves(outputs)
        return outputs, self._before

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self._marked:
            i = self._marked[node]
            self._before[i] = value
            return value + self._shifts[i]
        return value


class _Watch(TorchFunctionMode):
    """Refuses what a graph of operations does not show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise NotCapturedError("a part of the model runs without gradient (torch.no_grad)")
        if func in _HIDDEN:
            raise NotCapturedError(f"the model calls Tensor.{getattr(func, '__name__', func)}")
        return func(*args, **(kwargs or {}))


_HIDDEN = {
    Tensor.detach,
    Tensor.detach_,
    Tensor.register_hook,
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
}


def _require_plain(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotCapturedError(f"module {name!r} has backward hooks")
