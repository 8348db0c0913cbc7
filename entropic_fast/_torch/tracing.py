"""The operations that a function of tensors computes, captured by torch's `make_fx`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .full_precision import RefCountedContext
from .uncompiled import inlined


@RefCountedContext
@contextlib.contextmanager
def told_of_tracing() -> Iterator[None]:
    """Within it, `torch.compiler.is_compiling()` is true, as within `torch.compile`.

    Models ask it before a shortcut that reads a value back, such as whether a mask is empty.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def requires_grad(tensor: Tensor) -> bool:
    """Whether there will be a gradient; vmap's own tensors always deny it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def graph_of(
    function: Callable[..., Any],
    *arguments: Any,
    decompositions: Any = None,
    without_values: bool = False,
) -> fx.GraphModule:
    """The graph of a function, run once with these arguments.

    `without_values` runs it with shapes alone, which takes no memory; the function may then read no
    value, and needs torch's meta kernels.

    One fake mode serves all nodes' `meta["val"]`. By default torch makes one per node, with the
    call stack: 0.8 s for a ResNet-20 instead of 0.3.
    """
    with inlined(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        mode: Any = "fake" if without_values else "real"
        return make_fx(
            function, decomposition_table=decompositions, tracing_mode=mode,
            _allow_non_fake_inputs=without_values,
        )(*arguments)  # fmt: skip
