"""Calls past torch's dispatcher where nobody listens to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def undispatched(
    operation: Callable[..., Any], function: Callable[..., Any], tensor: Tensor
) -> Callable[..., Any]:
    """The operation where torch traces or transforms; else its function.

    The dispatcher costs an operation with written arguments 50 to 110 microseconds of Python, as
    much as its work on a small network.

    Args:
        tensor: one of the arguments; subclasses see every operation.
    """
    plain = (
        type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
    return function if plain else operation
