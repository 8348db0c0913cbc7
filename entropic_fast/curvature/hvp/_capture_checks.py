"""What a graph of operations does not show of a model: refused by name, before it is captured.

The model runs once more as autograd would run it, with parameters that require gradients, since
what hides may depend on that: hooks, functions with a backward pass of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..._torch.graph_checks import backward_nodes
from ..._torch.tracing import requires_grad
from ..._utils.trees import Tree
from ...objective import Objective
from ._decompositions import FUNCTIONS


class GraphCaptureError(RuntimeError):
    """A model whose graph does not say all there is to its derivatives; the message says why."""


def require_nothing_hidden(obj: Objective, theta: Tensor, inputs: Tree) -> Tensor:
    """Refuse a model with derivatives that its operations do not show, for inputs [n, ...].

    Returns:
        the outputs at theta.

    Raises:
        GraphCaptureError: naming what it has.
    """
    for name, module in obj.module.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise GraphCaptureError(f"module {name!r} has backward hooks")
    leaf = theta.detach().requires_grad_()
    with torch.enable_grad(), _no_hooks_on_saved_tensors():
        parts = obj.split(leaf)
        values = {**parts, **obj.buffers}
        with TraceGuard(gradients=True):
            outputs = obj.run_model(values, inputs)
    for node in backward_nodes(outputs):
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__
            raise GraphCaptureError(f"the model has a backward pass of its own ({name})")
    return outputs.detach()


class TraceGuard(TorchFunctionMode):
    """Refuses what a graph of operations does not show, and runs others in place of some.

    What is hidden is harmless where it depends on no parameter, as a table of angles computed
    under `torch.no_grad` does not.

    Args:
        gradients: whether tensors that depend on a parameter require a gradient, which tells
            them from others. Where none does, only values read back are refused.
    """

    def __init__(self, gradients: bool = False) -> None:
        super().__init__()
        self._gradients = gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READ:
            raise GraphCaptureError(f"the model calls Tensor.{_READ[func]}")
        func = FUNCTIONS.get(func, func)
        if not self._gradients or not _depends_on_parameters((args, kwargs)):
            return func(*args, **kwargs)
        if func in _HIDDEN:
            raise GraphCaptureError(f"the model calls Tensor.{_HIDDEN[func]}")
        result = func(*args, **kwargs)
        # Sizes and comparisons have no derivative with gradients either.
        if not torch.is_grad_enabled() and (result is None or _has_floating(result)):
            raise GraphCaptureError(
                "a part of the model runs without gradient (no_grad or autograd.Function)"
            )
        return result


def _depends_on_parameters(arguments: Any) -> bool:
    return any(isinstance(t, Tensor) and requires_grad(t) for t in tree_leaves(arguments))


def _has_floating(result: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(result))


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
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            yield
    except RuntimeError as error:
        if _HOOKS not in str(error):
            raise
        raise GraphCaptureError("the model has hooks on saved tensors") from error


_HOOKS = "hooks on saved tensors are not seen in a graph"
