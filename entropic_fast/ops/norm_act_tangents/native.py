"""Family `norm_act_tangents` on the compiled module: C++ for CPU tensors.

Called by `entropic_fast.ops.norm_act_tangents` with checked tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native


def push(
    u: Tensor,  # [K, m, C], overwritten with u + extra
    extra: Tensor | None,  # [K, m, C]
    normal: Tensor | None,  # [m, C]
    scale: Tensor | None,  # [C]
    tscale: Tensor | None,  # [K, C]
    tshift: Tensor | None,  # [K, C]
    residual: Tensor | None,  # [K, m, C]
    slope: Tensor | None,  # [m, C]
    cotangent: Tensor | None,  # [m, C]
    bend: Tensor | None,  # [m, C]
    out: Tensor,  # [K, m, C] written
) -> tuple[Tensor, Tensor]:  # [K, C] float64 or [0, 0], [K] float64 or [0]
    k, _, c = u.shape
    sums = u.new_empty((0, 0) if cotangent is None else (k, c), dtype=torch.float64)
    forms = u.new_empty(0 if bend is None else k, dtype=torch.float64)
    pieces = (extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend)
    strides = u.stride(0), *_strides(extra), _strides(residual)[0], out.stride(0)
    _call("push", u, (*pieces, out, sums, forms), strides)
    return sums, forms


def pull(
    u: Tensor,  # [K, m, C], overwritten with g = slope (u + extra + residual)
    extra: Tensor | None,  # [K, m, C]
    residual: Tensor | None,  # [K, m, C]
    slope: Tensor | None,  # [m, C]
    normal: Tensor | None,  # [m, C]
    scale: Tensor | None,  # [C]
    tscale: Tensor | None,  # [K, C]
    cotangent: Tensor | None,  # [m, C]
    ty: Tensor | None,  # [K, m, C]
    rstd: Tensor | None,  # [C]
    out: Tensor | None,  # [K, m, C] written
) -> tuple[Tensor, Tensor]:  # [K, C], [K, C]
    dscale = u.new_empty(u.shape[0], u.shape[2])
    dshift = torch.empty_like(dscale)
    pieces = (extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd)
    single = (_strides(t)[0] for t in (residual, ty, out))
    strides = u.stride(0), *_strides(extra), *single
    _call("pull", u, (*pieces, out, dscale, dshift), strides)
    return dscale, dshift


def normalise(
    y: Tensor,  # [m, C]
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [m, C]
    z: Tensor,  # [m, C] written
    normal: Tensor,  # [m, C] written
    slope: Tensor | None,  # [m, C] written; None: no ReLU
) -> None:
    _call("normalise", y[None], (mean, rstd, weight, bias, residual, z, normal, slope), ())


def inner(
    a: Tensor,  # [K, m, C]
    b: Tensor,  # [K, m, C]
) -> Tensor:  # [K] float64
    result = a.new_empty(a.shape[0], dtype=torch.float64)
    _call("inner", a, (b, result), (a.stride(0), *_strides(b)))
    return result


def _call(
    name: str,
    first: Tensor,  # [K, m, C]
    others: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
) -> None:
    suffix = "float32" if first.dtype == torch.float32 else "float64"
    entry = getattr(native.module(), f"jet_{name}_cpu_{suffix}")
    addresses = (0 if t is None else t.data_ptr() for t in (first, *others))
    entry((*first.shape, *addresses, *strides), native.threads())


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Along k and pixels; those of one pixel are what they would be among more."""
    if tensor is None:
        return 0, 0
    pixel = tensor.shape[2] if tensor.shape[1] <= 1 else tensor.stride(1)
    return tensor.stride(0), pixel
