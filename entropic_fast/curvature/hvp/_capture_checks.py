"""Checks before and after capture: derivatives a graph would miss, and which nodes are linear."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..._torch.graph_checks import backward_nodes
from ..._torch.tracing import requires_grad
from ..._utils.trees import Tree
from ...objective import Objective
from ._decompositions import FUNCTIONS

aten = torch.ops.aten


class GraphCaptureError(RuntimeError):
    """The captured graph would miss part of the model's derivative; the message says which."""


def require_nothing_hidden(obj: Objective, theta: Tensor, inputs: Tree) -> Tensor:
    """The outputs at theta for inputs [n, ...], if a graph would miss no derivative."""
    for name, module in obj.module.named_modules():
        # Backward hooks may change gradients, and leave no operation in a graph.
        if module._backward_hooks or module._backward_pre_hooks:
            raise GraphCaptureError(f"module {name!r} has backward hooks")
    # Parameters require gradients, as hooks and custom backward passes may depend on that.
    leaf = theta.detach().requires_grad_()
    with torch.enable_grad(), _no_hooks_on_saved_tensors():
        parts = obj.split(leaf)
        values = {**parts, **obj.buffers}
        with TraceGuard(gradients=True):
            outputs = obj.run_model(values, inputs)
    for node in backward_nodes(outputs):
        # Its backward pass may be anything, and need not be differentiable.
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__
            raise GraphCaptureError(f"the model has a backward pass of its own ({name})")
    return outputs.detach()


class TraceGuard(TorchFunctionMode):
    """Rejects calls whose derivative a graph would miss, and replaces those of `FUNCTIONS`.

    With `gradients`, tensors that depend on a parameter require a gradient, by which they are
    recognized; otherwise only values read back to Python are rejected.
    """

    def __init__(self, gradients: bool = False) -> None:
        super().__init__()
        self._gradients = gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READ:
            raise GraphCaptureError(f"the model calls Tensor.{_READ[func]}")
        func = FUNCTIONS.get(func, func)
        # Harmless otherwise: a table of angles may be computed under `torch.no_grad`.
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not self._gradients or not any(requires_grad(t) for t in given):
            return func(*args, **kwargs)
        if func in _HIDDEN:
            raise GraphCaptureError(f"the model calls Tensor.{_HIDDEN[func]}")
        result = func(*args, **kwargs)
        # Sizes and comparisons have no derivative with gradients either.
        floating = (t.is_floating_point() for t in tree_leaves(result) if isinstance(t, Tensor))
        if not torch.is_grad_enabled() and (result is None or any(floating)):
            raise GraphCaptureError(
                "part of the model runs without gradient (no_grad or autograd.Function)"
            )
        return result


_READ: dict[Any, str] = {Tensor.tolist: "tolist", Tensor.numpy: "numpy"}
_HIDDEN: dict[Any, str] = {
    Tensor.detach: "detach",
    Tensor.detach_: "detach_",
    Tensor.register_hook: "register_hook",
    Tensor.data.__get__: "data",  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__: "grad_fn",  # type: ignore[attr-defined]
}


@contextmanager
def _no_hooks_on_saved_tensors() -> Iterator[None]:
    try:
        # `torch.utils.checkpoint` has such hooks: it computes values again in the backward pass.
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            yield
    except RuntimeError as error:
        if _HOOKS not in str(error):
            raise
        raise GraphCaptureError("the model has hooks on saved tensors") from error


_HOOKS = "hooks on saved tensors are not seen in a graph"


# -- linear operations -------------------------------------------------------------------------

# Piecewise linear: the second derivative is 0 wherever it exists.
PIECEWISE = {
    aten.relu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.abs.default,
    aten.max_pool2d_with_indices.default, aten.clamp.default, aten.clamp_min.default,
    aten.maximum.default, aten.minimum.default, aten.max.dim, aten.amax.default,
}  # fmt: skip
# Linear in all tensor arguments together, where a mask does not change.
LINEAR = PIECEWISE | {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.cat.default, aten.stack.default, aten.flip.default, aten.roll.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten._to_copy.default, aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar,
    aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.sum.default, aten.sum.dim_IntList,
    aten.mean.default, aten.mean.dim, aten.constant_pad_nd.default, aten.diagonal.default,
    aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.as_strided.default,
    aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.unfold.default,
    aten.slice_scatter.default, aten.select_scatter.default, aten.embedding.default,
    aten.cumsum.default, aten.upsample_nearest2d.vec,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default,
    aten.slice_backward.default, aten.select_backward.default, aten.masked_fill.Scalar,
    aten.where.self, aten.threshold_backward.default,
}  # fmt: skip

# Linear in each of these arguments (by position) with the others fixed, and in no other argument.
MULTILINEAR: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.div.Tensor: (0,),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.native_batch_norm.default: (0, 1),
}
# Arguments that these operations add without multiplying them.
ADDED: dict[Any, tuple[int, ...]] = {
    aten.addmm.default: (0,),
    aten.baddbmm.default: (0,),
    aten.convolution.default: (2,),
    aten.native_batch_norm.default: (2,),
}


def is_linear(node: fx.Node, active: Container[fx.Node]) -> bool:
    """Whether a node is (piecewise) linear in all its active arguments together."""
    if node.target in LINEAR or node.op != "call_function":
        return True
    if node.target not in MULTILINEAR:
        return False
    positions = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in active]
    # Two active factors make a product of second order, as activations and weights do.
    factors = [i for i in positions if i in MULTILINEAR[node.target]]
    others = [i for i in positions if i not in factors and i not in ADDED.get(node.target, ())]
    return not others and len(factors) <= 1
