"""Per-example gradients of normalization layers in plain PyTorch.

Checked tensors on any device, with the shapes of `entropic_fast.ops.norm_example_grads`. Sums
are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_grads(
    x: Tensor,  # [n, S, C]
    g: Tensor,  # [n, S, C]
    mean: Tensor,  # [n or 1, S or 1, C or 1]
    rstd: Tensor,  # [n or 1, S or 1, C or 1]
) -> tuple[Tensor, Tensor]:  # [n, C], [n, C]
    dscale = ((x - mean) * rstd).mul_(g).sum(1, dtype=torch.float64)
    dshift = g.sum(1, dtype=torch.float64)
    return dscale.to(x.dtype), dshift.to(x.dtype)


def batch_norm_backward(
    x: Tensor,  # [n, S, C]
    g: Tensor,  # [n, S, C]
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    weight: Tensor,  # [C]
) -> tuple[Tensor, Tensor, Tensor]:  # [n, S, C], [n, C], [n, C]
    dscale, dshift = affine_grads(x, g, mean.view(1, 1, -1), rstd.view(1, 1, -1))
    return g * (rstd * weight), dscale, dshift
