"""Tangents through normalization and activation in plain PyTorch, on any device; float64 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops.norm_act_tangents.checks import (
    InnerProducts,
    Jvp,
    NormAct,
    VjpTangent,
    new_sums,
    new_values,
)


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:  # sums, forms
    u = a.u
    if a.extra is not None:
        u += a.extra
    pre = u if a.scale is None else u * a.scale
    if a.tscale is not None and a.normal is not None:
        pre = pre + a.tscale[:, None] * a.normal
    if a.tshift is not None:
        pre = pre + a.tshift[:, None]
    if a.residual is not None:
        pre = pre + a.residual
    a.out.copy_(pre if a.slope is None else a.slope * pre)
    sums, forms = new_sums(a)
    if a.cotangent is not None:
        sums = (a.cotangent * u).sum(1, dtype=torch.float64)
    if a.bend is not None:
        forms = (a.bend * pre.square()).sum((1, 2), dtype=torch.float64)
    return sums, forms


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor]:  # dscale, dshift
    u = a.u
    for addend in (a.extra, a.residual):
        if addend is not None:
            u += addend
    if a.slope is not None:
        u *= a.slope
    if a.out is not None:
        result = u if a.scale is None else u * a.scale
        if a.tscale is not None and a.cotangent is not None:
            result = result + a.tscale[:, None] * a.cotangent
        a.out.copy_(result)
    dscale = u.new_zeros((u.shape[0], u.shape[2]), dtype=torch.float64)
    if a.normal is not None:
        dscale += (u * a.normal).sum(1, dtype=torch.float64)
    if a.ty is not None and a.cotangent is not None:
        term = (a.cotangent * a.ty).sum(1, dtype=torch.float64)
        dscale += term if a.rstd is None else term * a.rstd
    return dscale.to(u.dtype), u.sum(1, dtype=torch.float64).to(u.dtype)


def norm_act(a: NormAct) -> tuple[Tensor, Tensor, Tensor]:  # z, normal, slope
    z, normal, slope = new_values(a)
    torch.mul(a.y - a.mean, a.rstd, out=normal)
    pre = normal if a.weight is None else normal * a.weight
    for addend in (a.bias, a.residual):
        pre = pre if addend is None else pre + addend
    if a.relu:
        slope.copy_(pre > 0)
        pre = pre.relu()
    z.copy_(pre)
    return z, normal, slope


def inner_products(a: InnerProducts) -> Tensor:  # [K]
    return (a.a * a.b).sum((1, 2), dtype=torch.float64)
