"""Tangents through layer and RMS normalization in plain PyTorch, on any device; float64 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops.row_norm_tangents.checks import Jvp, VjpTangent, new_jvp


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:  # out, terms
    centered, along = _moved(a.t, a.normal, a.centered)
    rstd = a.rstd[:, None]
    tn = rstd * (centered - a.normal * along)
    out = tn if a.weight is None else tn * a.weight
    if a.tweight is not None:
        out = out + a.tweight[:, None] * a.normal
    if a.tbias is not None:
        out = out + a.tbias[:, None]
    _, terms = new_jvp(a)
    if a.cotangent is not None:
        h = a.cotangent if a.weight is None else a.cotangent * a.weight
        square = centered.square().mean(2, keepdim=True)
        bend = (3 * along.square() - square) * a.normal - 2 * along * centered
        terms = (h * rstd.square() * bend).sum((1, 2), dtype=torch.float64)
        if a.tweight is not None:
            terms += 2 * (a.cotangent * a.tweight[:, None] * tn).sum((1, 2), dtype=torch.float64)
    return out, terms


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor, Tensor]:  # out, dweight, dbias
    normal, rstd = a.normal, a.rstd[:, None]
    zero = normal.new_zeros(())
    weight = normal.new_ones(()) if a.weight is None else a.weight
    th = zero if a.u is None else a.u * weight
    if a.tweight is not None and a.cotangent is not None:
        th = th + a.tweight[:, None] * a.cotangent
    tn = along = h = zero
    if a.t is not None and a.cotangent is not None:
        centered, along = _moved(a.t, normal, a.centered)
        tn = rstd * (centered - normal * along)
        h = a.cotangent * weight
    mean_h, along_h = _means(h, h * normal, a.centered)
    mean_th, along_th = _means(th, tn * h + normal * th, a.centered)
    out = rstd * (th - mean_th - normal * along_th - tn * along_h)
    if a.t is not None:
        out = out - rstd.square() * along * (h - mean_h - normal * along_h)
    if not a.weights:
        return out, normal.new_empty(0, 0), normal.new_empty(0, 0)
    dweight, dbias = (normal.new_zeros(len(out), normal.shape[1]) for _ in range(2))
    if a.u is not None:
        dweight = (a.u * normal).sum(1, dtype=torch.float64)
        dbias = a.u.sum(1, dtype=torch.float64)
    if a.t is not None and a.cotangent is not None:
        dweight = dweight + (a.cotangent * tn).sum(1, dtype=torch.float64)
    return out, dweight.to(normal.dtype), dbias.to(normal.dtype)


def _moved(t: Tensor, normal: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """t less its mean if centered, and the mean of normal t along rows."""
    along = (normal * t).mean(2, keepdim=True)
    return (t - t.mean(2, keepdim=True) if centered else t), along


def _means(h: Tensor, product: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    if h.dim() == 0 and product.dim() == 0:
        return h, h
    mean = h.mean(-1, keepdim=True) if centered and h.dim() else h.new_zeros(())
    return mean, product.mean(-1, keepdim=True)
