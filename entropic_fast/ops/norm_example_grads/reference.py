"""Per-example gradients of normalization layers in plain PyTorch, on any device; float64 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops.norm_example_grads.checks import AffineGrads, BatchNormBackward


def affine_grads(a: AffineGrads) -> tuple[Tensor, Tensor]:  # dscale, dshift
    dscale = ((a.x - a.mean) * a.rstd).mul_(a.g).sum(1, dtype=torch.float64)
    dshift = a.g.sum(1, dtype=torch.float64)
    return dscale.to(a.x.dtype), dshift.to(a.x.dtype)


def batch_norm_backward(a: BatchNormBackward) -> tuple[Tensor, Tensor, Tensor]:
    per_channel = a.mean.view(1, 1, -1), a.rstd.view(1, 1, -1)
    dscale, dshift = affine_grads(AffineGrads(a.x, a.g, *per_channel))
    return a.g * (a.rstd * a.weight), dscale, dshift
