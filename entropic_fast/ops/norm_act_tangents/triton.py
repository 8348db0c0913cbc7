"""Family `norm_act_tangents` in Triton.

One program owns a tile of pixels and channels for a group of tangents: what the tangents share is
read once and stays in registers, and each tensor of K is read and written once. Sums are float64,
one partial sum per tile, added by torch in a fixed order, so results are the same bits run after
run.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import FUSE, count, on_device
from entropic_fast.ops.norm_act_tangents.checks import (
    InnerProducts,
    Jvp,
    NormAct,
    VjpTangent,
    new_inner_products,
    new_sums,
    new_values,
)

# Elements of a tile: 8 for each thread, two loads of 16 bytes in flight for each tensor read.
TILE = 2048
# Not timed on a GPU. By ptxas for sm_90 `jvp` with all its arguments needs 210 registers at 4
# warps, 124 at 8 and 82 at 16, and `vjp_tangent` 214, 126 and 84, without spills. Two tiles fit
# into a multiprocessor's 65,536 registers at 4 warps and at 8, one at 16: with 8, the same tiles
# are worked on by 16 warps in place of 8.
WARPS = 8
# Channels of a tile: rows of 64 floats are whole cache lines.
CHANNELS = 64
# Tangents are dealt out to more programs until there are so many: a few for every multiprocessor.
PROGRAMS = 1024


@triton.jit
def jvp_kernel(
    u, extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend, out, sums, forms,
    K, m, C, blocks, groups, u_k, extra_k, extra_pixel, residual_k, out_k,
    EXTRA: tl.constexpr, SCALE: tl.constexpr, TSCALE: tl.constexpr, TSHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr, FORMS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """A tile of `out` (and of u) for a group's tangents; its part of sums and forms."""
    tile = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    pixel = (tile // blocks) * TILE_P + tl.arange(0, TILE_P).to(tl.int64)
    c = (tile % blocks) * TILE_C + tl.arange(0, TILE_C).to(tl.int64)
    in_row = c < C
    mask = (pixel < m)[:, None] & in_row[None, :]
    at = pixel[:, None] * C + c[None, :]
    extra_at = pixel[:, None] * extra_pixel + c[None, :]
    if SCALE:
        by_scale = tl.load(scale + c, mask=in_row, other=0.0)[None, :]
    if TSCALE:
        by_normal = tl.load(normal + at, mask=mask, other=0.0)
    if SLOPE:
        by_slope = tl.load(slope + at, mask=mask, other=0.0)
    if SUMS:
        by_cotangent = tl.load(cotangent + at, mask=mask, other=0.0).to(tl.float64)
    if FORMS:
        by_bend = tl.load(bend + at, mask=mask, other=0.0).to(tl.float64)
    for k in count(group, K, groups):
        far = tl.cast(k, tl.int64)
        y = tl.load(u + far * u_k + at, mask=mask, other=0.0)
        if EXTRA:
            y += tl.load(extra + far * extra_k + extra_at, mask=mask, other=0.0)
            tl.store(u + far * u_k + at, y, mask=mask)
        pre = y
        if SCALE:
            pre = pre * by_scale
        if TSCALE:
            pre += tl.load(tscale + far * C + c, mask=in_row, other=0.0)[None, :] * by_normal
        if TSHIFT:
            pre += tl.load(tshift + far * C + c, mask=in_row, other=0.0)[None, :]
        if RESIDUAL:
            pre += tl.load(residual + far * residual_k + at, mask=mask, other=0.0)
        result = pre
        if SLOPE:
            result = by_slope * pre
        tl.store(out + far * out_k + at, result, mask=mask)
        if SUMS:
            total = tl.sum(by_cotangent * y.to(tl.float64), axis=0)
            tl.store(sums + ((tile // blocks) * K + far) * C + c, total, mask=in_row)
        if FORMS:
            wide = pre.to(tl.float64)
            form = tl.where(mask, by_bend * wide * wide, 0.0)  # pixels past m have a shift, too
            tl.store(forms + tile * K + far, tl.sum(tl.sum(form, axis=0), axis=0))


@triton.jit
def vjp_tangent_kernel(
    u, extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd, out, dscale, dshift,
    K, m, C, blocks, groups, u_k, extra_k, extra_pixel, residual_k, ty_k, out_k,
    EXTRA: tl.constexpr, RESIDUAL: tl.constexpr, SLOPE: tl.constexpr, NORMAL: tl.constexpr,
    SCALE: tl.constexpr, TSCALE: tl.constexpr, TY: tl.constexpr, RSTD: tl.constexpr,
    OUT: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """A tile of g and `out` for a group's tangents; its part of dscale and dshift."""
    tile = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    pixel = (tile // blocks) * TILE_P + tl.arange(0, TILE_P).to(tl.int64)
    c = (tile % blocks) * TILE_C + tl.arange(0, TILE_C).to(tl.int64)
    in_row = c < C
    mask = (pixel < m)[:, None] & in_row[None, :]
    at = pixel[:, None] * C + c[None, :]
    extra_at = pixel[:, None] * extra_pixel + c[None, :]
    if SLOPE:
        by_slope = tl.load(slope + at, mask=mask, other=0.0)
    if NORMAL:
        by_normal = tl.load(normal + at, mask=mask, other=0.0).to(tl.float64)
    if SCALE:
        by_scale = tl.load(scale + c, mask=in_row, other=0.0)[None, :]
    if TSCALE or TY:
        by_cotangent = tl.load(cotangent + at, mask=mask, other=0.0)
    if TY:
        factor = by_cotangent.to(tl.float64)
        if RSTD:
            factor *= tl.load(rstd + c, mask=in_row, other=0.0).to(tl.float64)[None, :]
    for k in count(group, K, groups):
        far = tl.cast(k, tl.int64)
        g = tl.load(u + far * u_k + at, mask=mask, other=0.0)
        if EXTRA:
            g += tl.load(extra + far * extra_k + extra_at, mask=mask, other=0.0)
        if RESIDUAL:
            g += tl.load(residual + far * residual_k + at, mask=mask, other=0.0)
        if SLOPE:
            g = by_slope * g
        tl.store(u + far * u_k + at, g, mask=mask)
        if OUT:
            result = g
            if SCALE:
                result = result * by_scale
            if TSCALE:
                weight = tl.load(tscale + far * C + c, mask=in_row, other=0.0)
                result += weight[None, :] * by_cotangent
            tl.store(out + far * out_k + at, result, mask=mask)
        wide = g.to(tl.float64)
        sums = ((tile // blocks) * K + far) * C + c
        tl.store(dshift + sums, tl.sum(wide, axis=0), mask=in_row)
        if NORMAL:
            term = wide * by_normal
            if TY:
                there = tl.load(ty + far * ty_k + at, mask=mask, other=0.0)
                term += factor * there.to(tl.float64)
            tl.store(dscale + sums, tl.sum(term, axis=0), mask=in_row)
        elif TY:
            there = tl.load(ty + far * ty_k + at, mask=mask, other=0.0)
            tl.store(dscale + sums, tl.sum(factor * there.to(tl.float64), axis=0), mask=in_row)


@triton.jit
def norm_act_kernel(
    y, mean, rstd, weight, bias, residual, z, normal, slope, m, C, blocks,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """A tile of z, normal and slope."""
    tile = tl.program_id(0).to(tl.int64)
    pixel = (tile // blocks) * TILE_P + tl.arange(0, TILE_P).to(tl.int64)
    c = (tile % blocks) * TILE_C + tl.arange(0, TILE_C).to(tl.int64)
    in_row = c < C
    mask = (pixel < m)[:, None] & in_row[None, :]
    at = pixel[:, None] * C + c[None, :]
    centred = tl.load(y + at, mask=mask, other=0.0)
    centred -= tl.load(mean + c, mask=in_row, other=0.0)[None, :]
    found = centred * tl.load(rstd + c, mask=in_row, other=0.0)[None, :]
    tl.store(normal + at, found, mask=mask)
    if WEIGHT:
        found = found * tl.load(weight + c, mask=in_row, other=0.0)[None, :]
    if BIAS:
        found += tl.load(bias + c, mask=in_row, other=0.0)[None, :]
    if RESIDUAL:
        found += tl.load(residual + at, mask=mask, other=0.0)
    if RELU:
        tl.store(slope + at, tl.where(found > 0, 1.0, 0.0), mask=mask)
        found = tl.where(found < 0, 0.0, found)  # NaN stays
    tl.store(z + at, found, mask=mask)


@triton.jit
def inner_products_kernel(
    a, b, result, K, m, C, blocks, a_k, b_k, b_pixel, TILE_P: tl.constexpr, TILE_C: tl.constexpr
):
    """A tile's part of one inner product."""
    tile = (tl.program_id(0) // K).to(tl.int64)
    k = (tl.program_id(0) % K).to(tl.int64)
    pixel = (tile // blocks) * TILE_P + tl.arange(0, TILE_P).to(tl.int64)
    c = (tile % blocks) * TILE_C + tl.arange(0, TILE_C).to(tl.int64)
    mask = (pixel < m)[:, None] & (c < C)[None, :]
    here = tl.load(a + k * a_k + pixel[:, None] * C + c[None, :], mask=mask, other=0.0)
    there = tl.load(b + k * b_k + pixel[:, None] * b_pixel + c[None, :], mask=mask, other=0.0)
    term = here.to(tl.float64) * there.to(tl.float64)
    tl.store(result + tile * K + k, tl.sum(tl.sum(term, axis=0), axis=0))


class _Tiles:
    """How [K, m, C] is divided into tiles."""

    def __init__(self, u: Tensor) -> None:
        self.k, self.m, self.c = u.shape
        self.tile_c = min(CHANNELS, triton.next_power_of_2(self.c))
        self.tile_p = min(TILE // self.tile_c, triton.next_power_of_2(self.m))
        self.blocks = triton.cdiv(self.c, self.tile_c)
        self.rows = triton.cdiv(self.m, self.tile_p)
        self.tiles = self.rows * self.blocks
        self.groups = min(self.k, triton.cdiv(PROGRAMS, self.tiles))

    def constants(self) -> dict[str, int | bool]:
        return {"TILE_P": self.tile_p, "TILE_C": self.tile_c, "num_warps": WARPS, **FUSE}


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:
    k, m, c = a.u.shape
    if a.u.numel() == 0:
        sums, forms = new_sums(a)
        return sums.zero_(), forms.zero_()
    t = _Tiles(a.u)
    has_sums, has_forms = a.cotangent is not None, a.bend is not None
    sums = a.u.new_empty((t.rows, k, c) if has_sums else (0, 0, 0), dtype=torch.float64)
    forms = a.u.new_empty((t.tiles, k) if has_forms else (0, 0), dtype=torch.float64)
    strides = a.u.stride(0), *_strides(a.extra), _strides(a.residual)[0], a.out.stride(0)
    with on_device(a.u):
        jvp_kernel[(t.tiles * t.groups,)](
            *_given(a, a.u), sums, forms, k, m, c, t.blocks, t.groups, *strides,
            EXTRA=a.extra is not None, SCALE=a.scale is not None, TSCALE=a.tscale is not None,
            TSHIFT=a.tshift is not None, RESIDUAL=a.residual is not None,
            SLOPE=a.slope is not None, SUMS=has_sums, FORMS=has_forms, **t.constants(),
        )  # fmt: skip
    return sums.sum(0), forms.sum(0)


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor]:
    k, m, c = a.u.shape
    if a.u.numel() == 0:
        return a.u.new_zeros((k, c)), a.u.new_zeros((k, c))
    t = _Tiles(a.u)
    dshift = a.u.new_empty((t.rows, k, c), dtype=torch.float64)
    nothing = a.normal is None and a.ty is None
    dscale = torch.zeros_like(dshift) if nothing else torch.empty_like(dshift)
    along_k = (_strides(tensor)[0] for tensor in (a.residual, a.ty, a.out))
    with on_device(a.u):
        vjp_tangent_kernel[(t.tiles * t.groups,)](
            *_given(a, a.u), dscale, dshift, k, m, c, t.blocks, t.groups,
            a.u.stride(0), *_strides(a.extra), *along_k,
            EXTRA=a.extra is not None, RESIDUAL=a.residual is not None,
            SLOPE=a.slope is not None, NORMAL=a.normal is not None, SCALE=a.scale is not None,
            TSCALE=a.tscale is not None, TY=a.ty is not None, RSTD=a.rstd is not None,
            OUT=a.out is not None, **t.constants(),
        )  # fmt: skip
    return dscale.sum(0).to(a.u.dtype), dshift.sum(0).to(a.u.dtype)


def norm_act(a: NormAct) -> tuple[Tensor, Tensor, Tensor]:
    z, normal, slope = new_values(a)
    if a.y.numel() == 0:
        return z, normal, slope
    t = _Tiles(a.y[None])
    *tensors, relu = a
    with on_device(a.y):
        norm_act_kernel[(t.tiles,)](
            *_given(tensors, a.y), z, normal, slope if relu else a.y, t.m, t.c, t.blocks,
            WEIGHT=a.weight is not None, BIAS=a.bias is not None,
            RESIDUAL=a.residual is not None, RELU=relu, **t.constants(),
        )  # fmt: skip
    return z, normal, slope


def inner_products(a: InnerProducts) -> Tensor:
    k, m, c = a.a.shape
    if a.a.numel() == 0:
        return new_inner_products(a).zero_()
    t = _Tiles(a.a)
    result = a.a.new_empty((t.tiles, k), dtype=torch.float64)
    with on_device(a.a):
        inner_products_kernel[(t.tiles * k,)](
            a.a, a.b, result, k, m, c, t.blocks, a.a.stride(0), *_strides(a.b), **t.constants()
        )
    return result.sum(0)


def _given(tensors: Iterable[Tensor | None], other: Tensor) -> list[Tensor]:
    """`other` in place of what is absent: kernels get an address, and do not read it."""
    return [other if tensor is None else tensor for tensor in tensors]
