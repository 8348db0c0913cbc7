"""Family `conv_example_grads` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.conv_example_grads.checks import ConvWeightGrads, ConvWeightNorms, new_norms


def conv_weight_grads(c: ConvWeightGrads) -> None:
    native.call("conv_weight_grads", c.a, c.a, c.g, c.out, c.out.stride(0), *_shape(c))


def conv_weight_norms(c: ConvWeightNorms) -> Tensor:
    norms = new_norms(c)
    native.call("conv_weight_norms", c.a, c.a, c.g, norms, *_shape(c))
    return norms


def _shape(c: ConvWeightGrads | ConvWeightNorms) -> list[int]:
    """Sizes and strides in the order of `conv_shape` in csrc/cpu/conv_example_grads.cpp."""
    shape = [c.a.shape[0], c.groups]
    for tensor in (c.a, c.g):
        shape += [*tensor.shape[1:4], *tensor.stride()[1:4], tensor.stride(0), tensor.shape[4]]
    for sizes in (c.kernel, c.stride, c.padding, c.dilation):
        shape += sizes
    return shape
