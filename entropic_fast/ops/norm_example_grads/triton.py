"""Family `norm_example_grads` in Triton.

One program owns a block of channels of one example and reads its positions in order, once. Every
sum is float64: the work is bound by memory (8 bytes of x and g for about 6 operations).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import FUSE, count, on_device
from entropic_fast.ops.norm_example_grads.checks import AffineGrads, BatchNormBackward

# Elements of x and of g that a program loads at once: 16 for each of 128 threads, several loads of
# 16 bytes in flight.
LOADED = 2048
# Channels of a program: rows of 64 floats are whole cache lines, and more programs are better than
# wider ones when examples are few.
CHANNELS = 64


@triton.jit
def norm_kernel(
    x, g, mean, rstd, weight, grad_x, dscale, dshift,
    S, C, blocks, mean_n, mean_s, mean_c, rstd_n, rstd_s, rstd_c,
    GRAD_X: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dscale and dshift of BLOCK_C channels of one example; grad_x too if GRAD_X."""
    example = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = c < C
    column = c.to(tl.int64)
    mean += example * mean_n
    rstd += example * rstd_n
    scale_sum = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
    shift_sum = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float64)
    for start in count(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & in_row[None, :]
        position = s.to(tl.int64)[:, None]
        at = (example * S + position) * C + column[None, :]
        grad = tl.load(g + at, mask=mask, other=0.0)
        here = tl.load(x + at, mask=mask, other=0.0)
        middle = tl.load(mean + position * mean_s + column[None, :] * mean_c, mask=mask, other=0.0)
        factor = tl.load(rstd + position * rstd_s + column[None, :] * rstd_c, mask=mask, other=0.0)
        wide = grad.to(tl.float64)
        normal = (here.to(tl.float64) - middle.to(tl.float64)) * factor.to(tl.float64)
        scale_sum += wide * normal
        shift_sum += wide
        if GRAD_X:
            slope = factor * tl.load(weight + column, mask=in_row, other=0.0)[None, :]
            tl.store(grad_x + at, grad * slope, mask=mask)
    out = example * C + column
    dtype = dscale.dtype.element_ty
    tl.store(dscale + out, tl.sum(scale_sum, axis=0).to(dtype), mask=in_row)
    tl.store(dshift + out, tl.sum(shift_sum, axis=0).to(dtype), mask=in_row)


def _launch(
    x: Tensor,  # [n, S, C]
    g: Tensor,  # [n, S, C]
    mean: Tensor,  # [n or 1, S or 1, C or 1]
    rstd: Tensor,  # [n or 1, S or 1, C or 1]
    weight: Tensor,  # [C], read if grad_x is wanted
    grad_x: Tensor,  # [n, S, C] written, or empty
) -> tuple[Tensor, Tensor]:  # [n, C], [n, C]
    n, s, c = x.shape
    dscale, dshift = x.new_empty((n, c)), x.new_empty((n, c))
    if n * c > 0:
        block_c = min(CHANNELS, triton.next_power_of_2(c))
        block_s = min(LOADED // block_c, triton.next_power_of_2(max(s, 1)))
        blocks = triton.cdiv(c, block_c)
        strides = (*mean.expand(x.shape).stride(), *rstd.expand(x.shape).stride())
        with on_device(x):
            norm_kernel[(n * blocks,)](
                x, g, mean, rstd, weight, grad_x, dscale, dshift, s, c, blocks, *strides,
                GRAD_X=grad_x.numel() > 0, BLOCK_S=block_s, BLOCK_C=block_c, num_warps=4, **FUSE,
            )  # fmt: skip
    return dscale, dshift


def affine_grads(a: AffineGrads) -> tuple[Tensor, Tensor]:
    return _launch(a.x, a.g, a.mean, a.rstd, a.x, a.x.new_empty(0))


def batch_norm_backward(a: BatchNormBackward) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(a.x)
    per_channel = a.mean.view(1, 1, -1), a.rstd.view(1, 1, -1)
    dscale, dshift = _launch(a.x, a.g, *per_channel, a.weight, grad_x)
    return grad_x, dscale, dshift
