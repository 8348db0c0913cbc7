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

from ...model_checks import backward_nodes
from ...objective import Objective
from .decompositions import FUNCTIONS


class NotCapturedError(RuntimeError):
    """A model whose graph does not say all there is to its derivatives; the message says why."""


def require_nothing_hidden(obj: Objective, theta: Tensor, inputs: Tensor) -> None:
    """Refuse a model with derivatives that its operations do not show, for inputs [n, ...].

    Raises:
        NotCapturedError: naming what it has.
    """
    for name, module in obj._model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotCapturedError(f"module {name!r} has backward hooks")
    leaf = theta.detach().requires_grad_()
    with torch.enable_grad(), _no_hooks_on_saved_tensors():
        parts = obj.split(leaf)
        values = {**parts, **obj.buffers}
        with Watch():
            outputs = obj.run_model(values, inputs)
    for node in backward_nodes(outputs):
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__
            raise NotCapturedError(f"the model has a backward pass of its own ({name})")


class Watch(TorchFunctionMode):
    """Refuses what a graph of operations does not show, and runs others in place of some."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise NotCapturedError(
                "a part of the model runs without gradient (no_grad or autograd.Function)"
            )
        if func in _HIDDEN:
            raise NotCapturedError(f"the model calls Tensor.{_HIDDEN[func]}")
        func = FUNCTIONS.get(func, func)
        return func(*args, **(kwargs or {}))


_HIDDEN: dict[Any, str] = {
    Tensor.detach: "detach",
    Tensor.detach_: "detach_",
    Tensor.register_hook: "register_hook",
    Tensor.data.__get__: "data",  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__: "grad_fn",  # type: ignore[attr-defined]
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
}


@contextmanager
def _no_hooks_on_saved_tensors() -> Iterator[None]:
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            yield
    except RuntimeError as error:
        if _HOOKS not in str(error):
            raise
        raise NotCapturedError("the model has hooks on saved tensors") from error


_HOOKS = "hooks on saved tensors are not seen in a graph"
