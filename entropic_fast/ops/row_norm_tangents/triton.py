"""Family `row_norm_tangents` in Triton.

One program owns a group of rows for one tangent and holds a row at a time in registers, so that
each tensor of K is read and written once. Sums along a row are in the tensors' dtype; sums over
rows are float64, one partial sum per program, added by torch in a fixed order, so results are the
same bits run after run. Rows too long for registers use the reference.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import FUSE, count, on_device
from entropic_fast.ops.row_norm_tangents import reference
from entropic_fast.ops.row_norm_tangents.checks import (
    Jvp,
    VjpTangent,
    new_jvp,
    new_vjp_tangent,
    tangents_of,
)

# Longest row: 16 numbers of each of six tensors for 512 threads.
LONGEST = 8192
# Programs per tangent at most, each with separate partial sums [d]: a few for every
# multiprocessor of an H100 with four tangents.
GROUPS = 128


@triton.jit
def jvp_kernel(
    t, normal, rstd, weight, tweight, tbias, cotangent, out, terms,
    M, d, rows, groups,
    WEIGHT: tl.constexpr, TWEIGHT: tl.constexpr, TBIAS: tl.constexpr, TERMS: tl.constexpr,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out` of a group of rows for one tangent, and its share of the terms."""
    k = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    j = tl.arange(0, BLOCK)
    inside = j < d
    w = tl.load(weight + j, mask=inside, other=0.0) if WEIGHT else 1.0
    tw = tl.load(tweight + k * d + j, mask=inside, other=0.0) if TWEIGHT else 0.0
    tb = tl.load(tbias + k * d + j, mask=inside, other=0.0) if TBIAS else 0.0
    term = tl.zeros([1], dtype=tl.float64)
    for start in count(group * rows, tl.minimum((group + 1) * rows, M)):
        row = start + tl.zeros([1], dtype=tl.int64)
        at = row * d + j
        n = tl.load(normal + at, mask=inside, other=0.0)
        value = tl.load(t + k * M * d + at, mask=inside, other=0.0)
        r = tl.load(rstd + row)
        along = tl.sum(n * value, axis=0) / d
        if CENTERED:
            value = tl.where(inside, value - tl.sum(value, axis=0) / d, 0.0)
        tn = r * (value - n * along)
        tl.store(out + k * M * d + at, w * tn + tw * n + tb, mask=inside)
        if TERMS:
            g = tl.load(cotangent + at, mask=inside, other=0.0)
            h = w * g
            square = tl.sum(value * value, axis=0) / d
            bend = (3 * along * along - square) * n - 2 * along * value
            sums = r * r * tl.sum(h * bend, axis=0) + 2 * tl.sum(g * tw * tn, axis=0)
            term += sums.to(tl.float64)
    if TERMS:
        tl.store(terms + k * groups + group + tl.arange(0, 1), term)


@triton.jit
def vjp_tangent_kernel(
    u, t, normal, rstd, weight, tweight, cotangent, out, dweight, dbias,
    M, d, rows, groups,
    U: tl.constexpr, MOVES: tl.constexpr, WEIGHT: tl.constexpr, TWEIGHT: tl.constexpr,
    SUMS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients' tangents of a group of rows for one tangent."""
    k = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    j = tl.arange(0, BLOCK)
    inside = j < d
    w = tl.load(weight + j, mask=inside, other=0.0) if WEIGHT else 1.0
    tw = tl.load(tweight + k * d + j, mask=inside, other=0.0) if TWEIGHT else 0.0
    scale_sum = tl.zeros([BLOCK], dtype=tl.float64)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float64)
    for start in count(group * rows, tl.minimum((group + 1) * rows, M)):
        row = start + tl.zeros([1], dtype=tl.int64)
        at = row * d + j
        n = tl.load(normal + at, mask=inside, other=0.0)
        r = tl.load(rstd + row)
        g = tl.load(cotangent + at, mask=inside, other=0.0) if MOVES or TWEIGHT else n * 0.0
        th = n * 0.0
        dscale = n * 0.0
        if U:
            tg = tl.load(u + k * M * d + at, mask=inside, other=0.0)
            th += w * tg
            dscale += tg * n
            shift_sum += tg.to(tl.float64)
        if TWEIGHT:
            th += tw * g
        product = n * th
        first = n * 0.0
        if MOVES:
            value = tl.load(t + k * M * d + at, mask=inside, other=0.0)
            h = w * g
            along = tl.sum(n * value, axis=0) / d
            along_h = tl.sum(n * h, axis=0) / d
            mean_h = 0.0
            if CENTERED:
                value = tl.where(inside, value - tl.sum(value, axis=0) / d, 0.0)
                mean_h = tl.sum(h, axis=0) / d
            tn = r * (value - n * along)
            product += tn * h
            first = -r * r * along * (h - mean_h - n * along_h) - r * tn * along_h
            dscale += g * tn
        mean_th = tl.sum(th, axis=0) / d if CENTERED else 0.0
        x = first + r * (th - mean_th - n * (tl.sum(product, axis=0) / d))
        tl.store(out + k * M * d + at, x, mask=inside)
        scale_sum += dscale.to(tl.float64)
    if SUMS:
        to = (k * groups + group) * d + j
        tl.store(dweight + to, scale_sum, mask=inside)
        tl.store(dbias + to, shift_sum, mask=inside)


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:
    k, m, d = a.t.shape
    if d > LONGEST:
        return reference.jvp(a)
    out, terms = new_jvp(a)
    rows, groups = _groups(m)
    wanted = a.cotangent is not None
    partial = terms.new_zeros(k, groups) if wanted else terms
    if out.numel():
        with on_device(a.t):
            jvp_kernel[(k * groups,)](
                a.t, a.normal, a.rstd, _or(a.weight, a.t), _or(a.tweight, a.t), _or(a.tbias, a.t),
                _or(a.cotangent, a.t), out, partial, m, d, rows, groups,
                WEIGHT=a.weight is not None, TWEIGHT=a.tweight is not None,
                TBIAS=a.tbias is not None, TERMS=wanted, CENTERED=a.centered, **_block(d),
            )  # fmt: skip
    return out, partial.sum(1) if wanted else terms


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor, Tensor]:
    m, d = a.normal.shape
    if d > LONGEST:
        return reference.vjp_tangent(a)
    out, dweight, dbias = new_vjp_tangent(a)
    k, (rows, groups) = tangents_of(a), _groups(m)
    shape = (k, groups, d) if a.weights else (0,)
    sums = [out.new_zeros(shape).double() for _ in range(2)]
    if out.numel():
        with on_device(a.normal):
            vjp_tangent_kernel[(k * groups,)](
                _or(a.u, out), _or(a.t, out), a.normal, a.rstd, _or(a.weight, out),
                _or(a.tweight, out), _or(a.cotangent, out), out, *sums, m, d, rows, groups,
                U=a.u is not None, MOVES=a.t is not None, WEIGHT=a.weight is not None,
                TWEIGHT=a.tweight is not None, SUMS=a.weights, CENTERED=a.centered, **_block(d),
            )  # fmt: skip
    if not a.weights:
        return out, dweight, dbias
    return out, *(s.sum(1).to(out.dtype) for s in sums)  # type: ignore[return-value]


def _groups(m: int) -> tuple[int, int]:
    """Rows per program, and programs per tangent."""
    rows = max(1, triton.cdiv(m, GROUPS))
    return rows, max(1, triton.cdiv(m, rows))


def _block(d: int) -> dict[str, object]:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), **FUSE}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to point at, which the kernel does not read."""
    return other if tensor is None else tensor
