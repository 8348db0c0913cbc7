"""The operations that a function of tensors computes, written down by torch's `make_fx`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def graph_of(
    function: Callable[..., Any], *arguments: Any, decompositions: Any = None
) -> fx.GraphModule:
    """The graph of a function, run once with these arguments.

    Each node's value without its data, in `meta["val"]`, is of one fake mode. Left to itself,
    torch makes a mode for each, which notes the call stack: 0.8 s for a ResNet-20 in place of 0.3.

    >>> import torch
    >>> graph = graph_of(lambda x: x.exp() + 1, torch.zeros(2))
    >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ['aten.exp.default', 'aten.add.Tensor']
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function, decomposition_table=decompositions)(*arguments)
