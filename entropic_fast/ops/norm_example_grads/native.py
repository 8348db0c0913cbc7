"""Family `norm_example_grads` on the compiled module: C++ for CPU tensors.

Called by `entropic_fast.ops.norm_example_grads` with checked tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native


def affine_grads(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dscale = x.new_empty(x.shape[0], x.shape[2])
    dshift = torch.empty_like(dscale)
    _call(x, g, mean, rstd, None, None, dscale, dshift)
    return dscale, dshift


def batch_norm_backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    dscale = x.new_empty(x.shape[0], x.shape[2])
    dshift = torch.empty_like(dscale)
    per_channel = mean[None, None], rstd[None, None]
    _call(x, g, *per_channel, weight, grad_x, dscale, dshift)
    return grad_x, dscale, dshift


def _call(
    x: Tensor,  # [n, S, C]
    g: Tensor,  # [n, S, C]
    mean: Tensor,  # [n or 1, S or 1, C or 1]
    rstd: Tensor,  # like mean
    weight: Tensor | None,  # [C]
    grad_x: Tensor | None,  # [n, S, C]
    dscale: Tensor,  # [n, C]
    dshift: Tensor,  # [n, C]
) -> None:
    module = native.module()
    entry = module.norm_grads_float32 if x.dtype == torch.float32 else module.norm_grads_float64
    tensors = (x, g, mean, rstd, weight, grad_x, dscale, dshift)
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    strides = tuple(
        0 if size == 1 else step for size, step in zip(mean.shape, mean.stride(), strict=True)
    )
    entry(addresses, tuple(x.shape), strides, native.threads())
