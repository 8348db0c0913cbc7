"""Family `norm_example_grads` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.norm_example_grads.checks import (
    AffineGrads,
    BatchNormBackward,
    new_affine_grads,
    new_backward,
)


def affine_grads(a: AffineGrads) -> tuple[Tensor, Tensor]:
    results = new_affine_grads(a)
    strides = (
        0 if size == 1 else step for size, step in zip(a.mean.shape, a.mean.stride(), strict=True)
    )
    native.call("norm_grads", a.x, *a, None, None, *results, *a.x.shape, *strides)
    return results


def batch_norm_backward(a: BatchNormBackward) -> tuple[Tensor, Tensor, Tensor]:
    results = new_backward(a)
    channel = 0 if a.x.shape[2] == 1 else 1
    native.call("norm_grads", a.x, *a, *results, *a.x.shape, 0, 0, channel)
    return results
