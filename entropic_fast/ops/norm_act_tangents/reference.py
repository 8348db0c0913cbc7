"""Directional derivatives through normalisation and activation in plain PyTorch.

Checked tensors on any device; shapes as in `entropic_fast.ops.norm_act_tangents`. Sums are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    if extra is not None:
        u += extra
    pre = u if scale is None else u * scale
    if tscale is not None and normal is not None:
        pre = pre + tscale[:, None] * normal
    if tshift is not None:
        pre = pre + tshift[:, None]
    if residual is not None:
        pre = pre + residual
    out.copy_(pre if slope is None else slope * pre)
    sums = u.new_empty((0, 0), dtype=torch.float64)
    forms = u.new_empty(0, dtype=torch.float64)
    if cotangent is not None:
        sums = (cotangent * u).sum(1, dtype=torch.float64)
    if bend is not None:
        forms = (bend * pre.square()).sum((1, 2), dtype=torch.float64)
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
    for addend in (extra, residual):
        if addend is not None:
            u += addend
    if slope is not None:
        u *= slope
    if out is not None:
        result = u if scale is None else u * scale
        if tscale is not None and cotangent is not None:
            result = result + tscale[:, None] * cotangent
        out.copy_(result)
    dscale = u.new_zeros((u.shape[0], u.shape[2]), dtype=torch.float64)
    if normal is not None:
        dscale += (u * normal).sum(1, dtype=torch.float64)
    if ty is not None and cotangent is not None:
        term = (cotangent * ty).sum(1, dtype=torch.float64)
        dscale += term if rstd is None else term * rstd
    return dscale.to(u.dtype), u.sum(1, dtype=torch.float64).to(u.dtype)


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
    torch.mul(y - mean, rstd, out=normal)
    pre = normal if weight is None else normal * weight
    for addend in (bias, residual):
        pre = pre if addend is None else pre + addend
    if slope is not None:
        slope.copy_(pre > 0)
        pre = pre.relu()
    z.copy_(pre)


def inner(
    a: Tensor,  # [K, m, C]
    b: Tensor,  # [K, m, C]
) -> Tensor:  # [K] float64
    return (a * b).sum((1, 2), dtype=torch.float64)
