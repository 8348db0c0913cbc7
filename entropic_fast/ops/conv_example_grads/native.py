"""Family `conv_example_grads` on the compiled module: C++ for CPU tensors.

Called by `entropic_fast.ops.conv_example_grads` with checked tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropic_fast.ops import _native as native


def _shape(a: Tensor, g: Tensor, groups: int, *sizes: Sequence[int]) -> tuple[int, ...]:
    """Everything the compiled module needs to know beside addresses, in its order."""
    shape = [a.shape[0], groups]
    for tensor in (a, g):
        shape += [*tensor.shape[1:4], *tensor.stride()[1:4], tensor.stride(0), tensor.shape[4]]
    for size in sizes:
        shape += size
    return (*shape, native.threads())


def _suffix(a: Tensor) -> str:
    return "_cpu_float32" if a.dtype == torch.float32 else "_cpu_float64"


def conv_weight_grads(
    a: Tensor,
    g: Tensor,
    out: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    shape = _shape(a, g, groups, kernel, stride, padding, dilation)
    entry = getattr(native.module(), "conv_weight_grads" + _suffix(a))
    entry(shape, a.data_ptr(), g.data_ptr(), out.data_ptr(), out.stride(0))


def conv_weight_norms(
    a: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    norms = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    shape = _shape(a, g, groups, kernel, stride, padding, dilation)
    entry = getattr(native.module(), "conv_weight_norms" + _suffix(a))
    entry(shape, a.data_ptr(), g.data_ptr(), norms.data_ptr())
    return norms
