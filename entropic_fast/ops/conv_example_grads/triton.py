"""Family `conv_example_grads` in Triton.

For one example and group the gradient is a matrix product over positions, of g^T [O, P] with the
unfolded input [P, (k, c)], which is gathered tile by tile and never stored. One program owns one
tile of one example's gradient, and either stores it or sums its squares in float64; sums over tiles
follow in a fixed order, so results are the same bits run after run.

Every position of a tile takes BLOCK_O + BLOCK_KC loads for BLOCK_O * BLOCK_KC multiply-adds. The
tiles of one example are neighbors in the grid and read the same `a` and `g`, which stay in L2
(64 KB each for 16 channels of 32 x 32). Groups of fewer than 8 channels would leave most of a tile
empty: a second kernel computes a block of output channels and one column of the weight at a time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast._torch.matmul_precision import matmul_precision
from entropic_fast.ops._triton import FUSE, INPUT_PRECISION, count, on_device
from entropic_fast.ops.conv_example_grads.checks import ConvWeightGrads, ConvWeightNorms

# Positions summed in one run; such sums are then added up, so rounding does not grow with images.
CHUNK = tl.constexpr(1024)
# A coordinate outside of every image, even after a kernel's offset is added.
OUTSIDE = tl.constexpr(-(2**30))

# Rows (output channels) and columns of a tile. A larger tile loads less for each product; a smaller
# one is padded less.
TILES = tuple((rows, columns) for rows in (64, 32, 16) for columns in (64, 32, 16))
# Cost of loading one number relative to one multiply-add: index arithmetic, the copy to shared
# memory and from there to registers. An estimate; it decides between tiles of nearly equal cost.
LOAD_COST = 16


@triton.jit
def coordinates(index, height, width, DIMS: tl.constexpr):
    """(z, y, x) of positions numbered x fastest; leading dimensions of size 1 cost nothing."""
    z = tl.zeros_like(index)
    y = tl.zeros_like(index)
    x = index
    if DIMS > 1:
        x = index % width
        y = index // width
    if DIMS > 2:
        z = y // height
        y = y % height
    return z, y, x


@triton.jit
def is_inside(z, y, x, depth, height, width, DIMS: tl.constexpr):
    # As unsigned numbers negative coordinates are beyond every end.
    inside = x.to(tl.uint32) < tl.cast(width, tl.uint32)
    if DIMS > 1:
        inside = inside & (y.to(tl.uint32) < tl.cast(height, tl.uint32))
    if DIMS > 2:
        inside = inside & (z.to(tl.uint32) < tl.cast(depth, tl.uint32))
    return inside


@triton.jit
def tile_kernel(
    a, g, out, partial,
    tiles_o, tiles_kc, groups, group_c, group_o, width_kc,
    a_example, a_pixel, g_example, g_pixel, out_example,
    in_z, in_y, in_x, out_z, out_y, out_x, kernel_y, kernel_x,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x, dilation_z, dilation_y, dilation_x,
    NORMS: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_KC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_O, BLOCK_KC] of one example and group."""
    program = tl.program_id(0)
    tile_o = program % tiles_o
    tile_kc = (program // tiles_o) % tiles_kc
    group = (program // tiles_o // tiles_kc) % groups
    example = (program // tiles_o // tiles_kc // groups).to(tl.int64)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    kc = tile_kc * BLOCK_KC + tl.arange(0, BLOCK_KC)
    # Where each weight column reads, from the corner of a position's window.
    kz, ky, kx = coordinates(kc // group_c, kernel_y, kernel_x, DIMS)
    kz, ky, kx = kz * dilation_z, ky * dilation_y, kx * dilation_x
    column = ((kz * in_y + ky) * in_x + kx).to(tl.int64) * a_pixel + kc % group_c
    kx = tl.where(kc < width_kc, kx, OUTSIDE)
    a += example * a_example + group.to(tl.int64) * group_c
    g += example * g_example + group.to(tl.int64) * group_o

    positions = out_z * out_y * out_x
    total = tl.zeros([BLOCK_O, BLOCK_KC], dtype=a.dtype.element_ty)
    for chunk in count(0, positions, CHUNK):
        part = tl.zeros([BLOCK_O, BLOCK_KC], dtype=a.dtype.element_ty)
        for start in count(chunk, tl.minimum(chunk + CHUNK, positions), BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            z, y, x = coordinates(p, out_y, out_x, DIMS)
            z = z * stride_z - pad_z
            y = y * stride_y - pad_y
            x = x * stride_x - pad_x
            row = ((z * in_y + y) * in_x + x).to(tl.int64) * a_pixel
            x = tl.where(p < positions, x, OUTSIDE)
            inside = is_inside(
                z[:, None] + kz[None, :], y[:, None] + ky[None, :], x[:, None] + kx[None, :],
                in_z, in_y, in_x, DIMS,
            )  # fmt: skip
            seen = tl.load(a + row[:, None] + column[None, :], mask=inside, other=0.0)
            at = g + (p.to(tl.int64) * g_pixel)[:, None] + o[None, :]
            mask = (p < positions)[:, None] & (o < group_o)[None, :]
            grad = tl.load(at, mask=mask, other=0.0)
            part = tl.dot(
                tl.trans(grad), seen, part, input_precision=PRECISION, out_dtype=part.dtype
            )
        total += part

    mask = (o < group_o)[:, None] & (kc < width_kc)[None, :]
    if NORMS:
        square = tl.where(mask, total, 0.0).to(tl.float64)
        tl.store(partial + program, tl.sum(tl.sum(square * square, axis=1), axis=0))
    else:
        rows = (group * group_o + o).to(tl.int64) * width_kc
        at = out + example * out_example + rows[:, None] + kc[None, :]
        tl.store(at, total, mask=mask)


@triton.jit
def column_kernel(
    a, g, out, partial,
    tiles_o, width_kc, channels_o, group_c, group_o,
    a_example, a_pixel, g_example, g_pixel, out_example,
    in_z, in_y, in_x, out_z, out_y, out_x, kernel_y, kernel_x,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x, dilation_z, dilation_y, dilation_x,
    NORMS: tl.constexpr, DIMS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One weight column of BLOCK_O output channels, of any groups, of one example."""
    program = tl.program_id(0)
    kc = program % width_kc
    tile_o = (program // width_kc) % tiles_o
    example = (program // width_kc // tiles_o).to(tl.int64)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    c = o // group_o * group_c + kc % group_c
    kz, ky, kx = coordinates(kc // group_c, kernel_y, kernel_x, DIMS)
    kz, ky, kx = kz * dilation_z, ky * dilation_y, kx * dilation_x
    a += example * a_example
    g += example * g_example

    positions = out_z * out_y * out_x
    total = tl.zeros([BLOCK_P, BLOCK_O], dtype=a.dtype.element_ty)
    for start in count(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        z, y, x = coordinates(p, out_y, out_x, DIMS)
        z = z * stride_z - pad_z + kz
        y = y * stride_y - pad_y + ky
        x = x * stride_x - pad_x + kx
        row = ((z * in_y + y) * in_x + x).to(tl.int64) * a_pixel
        inside = is_inside(z, y, x, in_z, in_y, in_x, DIMS) & (p < positions)
        mask = inside[:, None] & (o < channels_o)[None, :]
        seen = tl.load(a + row[:, None] + c[None, :], mask=mask, other=0.0)
        at = g + (p.to(tl.int64) * g_pixel)[:, None] + o[None, :]
        total += seen * tl.load(at, mask=mask, other=0.0)
    value = tl.sum(total, axis=0)

    if NORMS:
        square = tl.where(o < channels_o, value, 0.0).to(tl.float64)
        tl.store(partial + program, tl.sum(square * square, axis=0))
    else:
        at = out + example * out_example + o.to(tl.int64) * width_kc + kc
        tl.store(at, value, mask=o < channels_o)


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """The tile that covers a gradient of this size at the least cost per position."""

    def cost(tile: tuple[int, int]) -> int:
        count = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
        return int(count * (tile[0] * tile[1] + LOAD_COST * (tile[0] + tile[1])))

    return min(TILES, key=cost)


def _pixel_stride(tensor: Tensor) -> int | None:
    """Elements from one pixel to the next if the same throughout an image (0 if it has but one)."""
    pixel, inner = None, 1
    for size, stride in zip(tensor.shape[3:0:-1], tensor.stride()[3:0:-1], strict=True):
        if size > 1:
            if pixel is None:
                pixel = stride
            elif stride != pixel * inner:
                return None
            inner *= size
    return pixel or 0


def _evenly_spaced(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if _pixel_stride(tensor) is None else tensor


def _trivial_dimensions(
    inputs: Sequence[int], outputs: Sequence[int], kernel: Sequence[int], padding: Sequence[int]
) -> int:
    """Leading dimensions in which the one position reads the one pixel."""
    sizes = zip(inputs, outputs, kernel, padding, strict=True)
    return next((d for d, size in enumerate(sizes) if size != (1, 1, 1, 0)), 3)


def _launch(
    c: ConvWeightGrads | ConvWeightNorms,
    out: Tensor | None,  # [n, O * prod(kernel) * C / groups], or None for norms
) -> Tensor:  # [n, tiles] float64, the tiles' squared norms; without meaning where `out` is given
    kernel, stride, padding, dilation, groups = c[-5:]
    a, g = _evenly_spaced(c.a), _evenly_spaced(c.g)
    n = a.shape[0]
    group_c, group_o = a.shape[-1] // groups, g.shape[-1] // groups
    width_kc = prod(kernel) * group_c
    if n * group_o * width_kc == 0:
        return a.new_zeros((n, 0), dtype=torch.float64)
    sizes = (*a.shape[1:4], *g.shape[1:4], *kernel[1:], *stride, *padding, *dilation)
    dims = 3 - min(_trivial_dimensions(a.shape[1:4], g.shape[1:4], kernel, padding), 2)
    strides = (
        a.stride(0), _pixel_stride(a), g.stride(0), _pixel_stride(g),
        0 if out is None else out.stride(0),
    )  # fmt: skip
    options = {"NORMS": out is None, "DIMS": dims, **FUSE}
    if groups > 1 and min(group_o, width_kc) < 8:
        block_o = min(64, max(16, triton.next_power_of_2(g.shape[-1])))
        tiles_o = triton.cdiv(g.shape[-1], block_o)
        partial = a.new_empty((n, tiles_o * width_kc), dtype=torch.float64)
        with on_device(a):
            column_kernel[(partial.numel(),)](
                a, g, partial if out is None else out, partial,
                tiles_o, width_kc, g.shape[-1], group_c, group_o, *strides, *sizes,
                BLOCK_O=block_o, BLOCK_P=2048 // block_o, num_warps=4, **options,
            )  # fmt: skip
        return partial
    precision = "float64" if a.dtype == torch.float64 else matmul_precision()
    block_o, block_kc = _tile(group_o, width_kc)
    tiles_o, tiles_kc = triton.cdiv(group_o, block_o), triton.cdiv(width_kc, block_kc)
    partial = a.new_empty((n, groups * tiles_o * tiles_kc), dtype=torch.float64)
    with on_device(a):
        tile_kernel[(partial.numel(),)](
            a, g, partial if out is None else out, partial,
            tiles_o, tiles_kc, groups, group_c, group_o, width_kc, *strides, *sizes,
            PRECISION=INPUT_PRECISION[precision], BLOCK_O=block_o, BLOCK_KC=block_kc, BLOCK_P=32,
            num_warps=min(4, max(1, block_o * block_kc // 512)), num_stages=3, **options,
        )  # fmt: skip
    return partial


def conv_weight_grads(c: ConvWeightGrads) -> None:
    _launch(c, c.out)


def conv_weight_norms(c: ConvWeightNorms) -> Tensor:  # [n]
    return _launch(c, None).sum(1)
