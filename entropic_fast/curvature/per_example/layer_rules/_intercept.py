"""Interception of layers under vmap, so that one backward pass sees each layer's A and G.

A covered call is replaced by an `autograd.Function` on the physical tensors [n, ...], whose
backward pass gives the layer's per-example gradients to a sink. See docs/design/per_example.md.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...._torch.full_precision import weight_norm
from ...._torch.tracing import requires_grad
from ...hvp._decompositions import FUNCTIONS
from ._base import Backward, FactoredGrad, LayerRule
from ._registry import LAYER_RULES

Sink = Callable[[str, FactoredGrad], None]


# How a model puts hooks on gradients (a tensor's, a node's, a module's), and what it asks before.
_prototype: Any = Tensor
HOOKS = {Tensor.register_hook, _prototype.grad_fn.__get__}
# Hugging Face's `Conv1D` and models that write W.t() use a tracked matrix by its transpose.
TRANSPOSES = {
    torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute,
    _prototype.T.__get__, _prototype.mT.__get__,
}  # fmt: skip
REQUIRES_GRAD = _prototype.requires_grad.__get__


class NestedTransformError(RuntimeError):
    """A layer called under a transform of the model's own, whose axes a rule cannot read."""


class GradientHookError(RuntimeError):
    """A hook on a gradient, which under vmap would be lost, or see all examples at once."""


class LayerInterceptor(TorchFunctionMode):
    """While entered, runs calls of layers with tracked `parameters` by their rules.

    `constants` are all other tensors of the model that depend on no parameter and no example.
    `example` is a zero of each example under vmap; None if there is none.
    """

    example: Tensor | None = None

    def __init__(self, parameters: dict[str, Tensor], constants: list[Tensor], sink: Sink) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._constants = {id(tensor) for tensor in constants}
        self._sink = sink
        # Transposes of tracked matrices, by their id while they live here.
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOOKS:
            raise GradientHookError("the model puts hooks on gradients")
        if func == REQUIRES_GRAD:
            return requires_grad(args[0])
        # Global means of images with channels last, in operations that vmap can trace.
        func = FUNCTIONS.get(func, func)
        make = LAYER_RULES.get(func)
        layer = None if make is None else self._of_parameter(make(*args, **kwargs))
        if layer is not None:
            if self._known(layer):
                return self._run_layer_rule(layer)
            core = layer.without_bias()
            if core is not None and layer.bias is not None and self._known(core):
                return self._run_layer_rule(core) + layer.bias
            if not layer.correct_under_vmap:
                return layer.vmap_safe(layer.x, layer.weight, layer.bias)
        if func in TRANSPOSES and args and id(args[0]) in self._names and args[0].ndim == 2:
            result = func(*args, **kwargs)
            if result.shape == args[0].shape[::-1] and result.stride() == args[0].stride()[::-1]:
                # Kept alive here, so that no other tensor gets its id.
                self._transposes[id(result)] = result, args[0]
            return result
        if func is torch._weight_norm:  # which has no rule for vmap
            return weight_norm(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            # Its projections are calls of F.linear, which the mode should see.
            with self:
                return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _run_layer_rule(self, layer: LayerRule) -> Tensor:
        x = layer.x
        # A table of positions is not batched: it has no gradient per example of its own.
        shared = not torch._C._functorch.is_functorch_wrapped_tensor(x)
        if shared and self.example is not None and any(layer.names) and layer.is_small():
            # The same for all examples, such as positions: as if each had its own.
            layer.x = x + self.example.to(x.dtype)
        return _apply(_Batched, layer.x, layer.weight, layer.bias, layer, self._sink)

    def _of_parameter(self, layer: LayerRule | None) -> LayerRule | None:
        """The layer in terms of a tracked matrix, where its weight is the transpose of one."""
        _, parameter = self._transposes.get(id(layer and layer.weight), (None, None))
        if layer is None or parameter is None:
            return layer
        return layer.transposed_of(parameter) or layer

    def _known(self, layer: LayerRule) -> bool:
        """Whether each tensor of the layer but x is tracked, constant or absent."""
        # Rules are for real numbers: with complex ones a gradient would need conjugates.
        if layer.x.is_complex() or (layer.weight is not None and layer.weight.is_complex()):
            return False
        for tensor in (layer.weight, layer.bias):
            if tensor is not None and id(tensor) not in self._names and not self._fixed(tensor):
                return False
        if not all(self._fixed(tensor) for tensor in layer.statistics):
            return False
        layer.names = tuple(
            None if t is None else self._names.get(id(t)) for t in (layer.weight, layer.bias)
        )
        return True

    def _fixed(self, tensor: Tensor) -> bool:
        return id(tensor) in self._constants


# `multi_head_attention_forward` hands itself to the mode whenever one is active. This twin, which
# takes its tensors for plain ones, runs its steps under the mode instead.
_attention = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**functional.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)
_attention.__kwdefaults__ = functional.multi_head_attention_forward.__kwdefaults__


def _apply(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


class _Batched(torch.autograd.Function):
    """The vmap side: finds the examples' axis and applies `_Physical` below vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, layer: LayerRule, sink: Sink) -> Tensor:
        # x does not depend on the example (a table of positions, say): the plain function.
        return layer.reference(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer, ctx.inputs = inputs[3], inputs[:3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Autograd's graph shows this node, so its parameters are left to the fallback; here for
        # the gradient that flows on.
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(t.is_floating_point())
                for t in ctx.inputs
            ]
            out = ctx.layer.vmap_safe(*leaves)
        needed = [
            t for t, n in zip(leaves, ctx.needs_input_grad[:3], strict=True) if n and t is not None
        ]
        of_needed = iter(torch.autograd.grad(out, needed, gradients, allow_unused=True))
        results = [next(of_needed) if n else None for n in ctx.needs_input_grad[:3]]
        return (*results, None, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: LayerRule,
        sink: Sink,
    ) -> tuple[Tensor, int]:
        # Rules need one weight for all examples, and examples in one axis.
        if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
            raise NestedTransformError("parameters batched by a transform of the model's own")
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise NestedTransformError("a transform of the model's own")
        x = x.movedim(in_dims[0], 0)
        return layer.shaped(_apply(_Physical, x, weight, bias, layer, sink), x), 0


class _Physical(torch.autograd.Function):
    """The layer on tensors [n, ...], with its rule in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: LayerRule, sink: Sink
    ) -> Tensor:
        out, saved = layer.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, *saved)
        ctx.layer, ctx.sink = layer, sink
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        layer: LayerRule = ctx.layer
        sink: Sink = ctx.sink
        # A sink that keeps pieces would keep the graph, which keeps the sink.
        del ctx.layer, ctx.sink
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        x_gradient, grads = layer.backward(
            Backward(x, weight, saved, gradient, ctx.needs_input_grad[0], wanted)
        )
        for name, grad in zip(layer.names, grads, strict=True):
            if name is not None and grad is not None:
                sink(name, grad)
        return x_gradient, None, None, None, None


def count_layer_rule_uses(losses: Tensor, parameters: dict[str, Tensor]) -> dict[str, int]:
    """How many rules use each parameter that the losses depend on; 0 if anything else uses it too.

    A parameter without an edge in the autograd graph is absent: its gradient is zero.
    """
    # Every differentiable use of a parameter is an edge to its leaf. If all come from rules, at
    # the slot of weight or bias, its gradient is the sum of what the rules give.
    edges: dict[int, list[bool]] = {id(p): [] for p in parameters.values()}
    ours: Any = _Physical
    start = losses.grad_fn
    stack, seen = [start] if start is not None else [], {start}
    while stack:
        node = stack.pop()
        covered_by_layer_rule = isinstance(node, ours._backward_cls)
        for slot, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None:
                if id(variable) in edges:
                    edges[id(variable)].append(covered_by_layer_rule and slot in (1, 2))
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    uses_of = {name: edges[id(p)] for name, p in parameters.items()}
    return {name: len(uses) if all(uses) else 0 for name, uses in uses_of.items() if uses}
