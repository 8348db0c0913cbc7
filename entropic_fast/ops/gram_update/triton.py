"""Family `gram_update` in Triton.

One program owns a tile of the result and a range of columns. Products of float32 rows are summed
in float32 over a few columns, then added to the program's float64 tile. When there are few tiles,
the columns are split among several programs; a second kernel adds their tiles in order, so the
result is the same bits run after run.

Per column a tile of B x B loads 2 B numbers for B^2 multiply-adds: B / 4 operations per byte in
float32, 16 for B = 64, and a third of those loads or less reach device memory, as programs that
share rows run side by side and meet in L2.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast._torch.matmul_precision import matmul_precision
from entropic_fast.ops._triton import FUSE, INPUT_PRECISION, count, on_device
from entropic_fast.ops.gram_update.checks import CrossUpdate, SymmetricUpdate

# Columns whose products tensor cores sum in float32 before they join the float64 sum.
CHUNK = tl.constexpr(256)
# The same without tensor cores, in a chain of rounded additions. Errors for K = 256 and 4,096
# without cancellation, simulated, in eps / sqrt(K / 256), of which 3 are allowed: 0.4 for chains of
# 16, 1.5 for 64, 3 for 128, 5 for 256. A conversion to float64 costs as much as 8 multiply-adds on
# compute capability 8.0 and 9.0 and 64 on 8.6 and 8.9, so each 16 columns it would cost half as
# much as the products, or four times as much.
SUM = tl.constexpr(64)
# Rows of a tile that one program of the second kernel adds up.
SLICE = 16
# Elements of all tiles that programs may hold if the result has few tiles: 32 MB, 1024 programs
# of 64 x 64 (two fit on each of a large GPU's 132 multiprocessors, so that the last, partly filled
# round of four is a small loss). A constant, so that results do not depend on the GPU.
WORKSPACE = 2**22
# Fewest columns that justify another program: writing a tile of doubles and reading it again is 16
# bytes per element, the same traffic as 2 to 4 columns' worth of products.
MIN_RANGE = 1024

# What runs -> rows of a tile, columns loaded at once, warps, stages of the software pipeline. A
# thread holds 64 x 64 / 128 = 32 sums in float32 (32 registers) and in float64 (64). Compiled for
# compute capability 8.0 and 9.0 by Triton 3.6 and 3.9 the first three use at most 255 registers
# without spilling (32 columns at once in float32 do not), so two programs fit on a multiprocessor;
# float32 has 9 multiply-adds to a 16-byte load from shared memory. TF32 is quick enough for L2 to
# be the limit: 128 x 128 halves the traffic, for a few registers spilled once every CHUNK columns.
TILES = {
    "float64": (64, 16, 4, 3),
    "float32": (64, 16, 4, 3),
    "tf32x3": (64, 32, 4, 3),
    "tf32": (128, 32, 8, 3),
}


@triton.jit
def add_products(
    total, a, b, start, stop,
    MASKED: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + a[:, start:stop] b[:, start:stop]^T, by sums of BLOCK_K columns if it is wider."""
    lanes = tl.arange(0, BLOCK_K)
    for k in count(start, stop, BLOCK_K):
        columns = k + lanes[None, :]
        if MASKED:
            x = tl.load(a + columns, mask=columns < stop, other=0.0)
            y = tl.load(b + columns, mask=columns < stop, other=0.0)
        else:
            x = tl.load(a + columns)
            y = tl.load(b + columns)
        if DOUBLE:
            x, y = x.to(tl.float64), y.to(tl.float64)
        y = tl.trans(y)
        if total.dtype == x.dtype:
            total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)
        else:
            total += tl.dot(x, y, input_precision=PRECISION).to(total.dtype)
    return total


@triton.jit
def add_single_products(total, a, b, start, stop, BLOCK_K: tl.constexpr):
    """total + a[:, start:stop] b[:, start:stop]^T, multiples of SUM columns, by sums of as many."""
    lanes = tl.arange(0, BLOCK_K)
    part = tl.zeros([total.shape[0], total.shape[1]], dtype=tl.float32)
    for k in count(start, stop, BLOCK_K):
        columns = k + lanes[None, :]
        x = tl.load(a + columns)
        y = tl.load(b + columns)
        part = tl.dot(x, tl.trans(y), part, input_precision="ieee")
        if (k - start) % SUM == SUM - BLOCK_K:
            total += part.to(tl.float64)
            part = tl.zeros([total.shape[0], total.shape[1]], dtype=tl.float32)
    return total


@triton.jit
def tile_of(program, columns, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr):
    """Tile (i, j) of this program: squares of GROUP x GROUP tiles, row by row."""
    group = program // (GROUP * GROUP)
    if SYMMETRIC:
        # Squares (I, J <= I) are numbered I (I + 1) / 2 + J; the root is exact where it matters.
        row = ((tl.sqrt((8 * group + 1).to(tl.float64)) - 1.0) * 0.5).to(tl.int32)
        column = group - row * (row + 1) // 2
    else:
        row = group // columns
        column = group % columns
    within = program % (GROUP * GROUP)
    return row * GROUP + within % GROUP, column * GROUP + within // GROUP


@triton.jit
def gram_kernel(
    a, b, out, partial, M, N, K, columns, column_range, a_row, b_row, out_row,
    SYMMETRIC: tl.constexpr, SPLIT: tl.constexpr, DOUBLE: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out or partial[range, program] of one tile; columns of K in ranges of `column_range`."""
    program = tl.program_id(0)
    i, j = tile_of(program, columns, SYMMETRIC, GROUP)
    wanted = (i * BLOCK < M) & (j * BLOCK < N)
    if SYMMETRIC:
        wanted = wanted & (j <= i)
    if wanted:
        lanes = tl.arange(0, BLOCK)
        # Rows past the end repeat the last one and are not stored.
        a_rows = tl.minimum(i * BLOCK + lanes, M - 1).to(tl.int64)
        b_rows = tl.minimum(j * BLOCK + lanes, N - 1).to(tl.int64)
        a_tile = a + a_rows[:, None] * a_row
        b_tile = b + b_rows[:, None] * b_row
        start = tl.program_id(1).to(tl.int64) * column_range
        stop = tl.minimum(start + column_range, K)
        full = start + (stop - start) // CHUNK * CHUNK
        total = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
        if PRECISION == "ieee":
            if SINGLE:
                total = add_single_products(total, a_tile, b_tile, start, full, BLOCK_K)
            else:
                total = add_products(
                    total, a_tile, b_tile, start, full, False, DOUBLE, PRECISION, BLOCK_K
                )
            total = add_products(
                total, a_tile, b_tile, full, stop, True, DOUBLE, PRECISION, BLOCK_K
            )
        else:
            for k in count(start, full, CHUNK):
                part = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
                part = add_products(
                    part, a_tile, b_tile, k, k + CHUNK, False, DOUBLE, PRECISION, BLOCK_K
                )
                total += part.to(tl.float64)
            part = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
            part = add_products(part, a_tile, b_tile, full, stop, True, DOUBLE, PRECISION, BLOCK_K)
            total += part.to(tl.float64)
        if SPLIT:
            slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program
            inside = lanes[:, None] * BLOCK + lanes[None, :]
            tl.store(partial + slot * (BLOCK * BLOCK) + inside, total)
        else:
            add_to_tile(out, out_row, total, i * BLOCK + lanes, j * BLOCK + lanes, M, N, SYMMETRIC)


@triton.jit
def add_to_tile(out, out_row, total, rows, columns, M, N, SYMMETRIC: tl.constexpr):
    """out[rows, columns] += total, inside the matrix and in its lower triangle."""
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    if SYMMETRIC:
        mask = mask & (rows[:, None] >= columns[None, :])
    at = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def add_partial_kernel(
    partial, out, M, N, columns, splits, out_row,
    SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """out += the sum over ranges of SLICE rows of one tile's partial sums, in order."""
    program = tl.program_id(0)
    i, j = tile_of(program, columns, SYMMETRIC, GROUP)
    rows = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    lanes = tl.arange(0, BLOCK)
    wanted = (i * BLOCK < M) & (j * BLOCK < N)
    if SYMMETRIC:
        wanted = wanted & (j <= i)
    if wanted:
        total = tl.zeros([SLICE, BLOCK], dtype=tl.float64)
        inside = rows[:, None] * BLOCK + lanes[None, :]
        for split in count(0, splits):
            slot = tl.cast(split, tl.int64) * tl.num_programs(0) + program
            total += tl.load(partial + slot * (BLOCK * BLOCK) + inside)
        add_to_tile(out, out_row, total, i * BLOCK + rows, j * BLOCK + lanes, M, N, SYMMETRIC)


def _add_product(
    out: Tensor, a: Tensor, b: Tensor, *, symmetric: bool, double_products: bool
) -> None:
    (rows, width), columns = a.shape, b.shape[0]
    if rows == 0 or columns == 0 or width == 0:
        return
    wide = double_products or a.dtype == torch.float64
    precision = "float64" if wide else matmul_precision()
    block, block_k, warps, stages = TILES[precision]
    tile_rows, tile_columns = triton.cdiv(rows, block), triton.cdiv(columns, block)
    group = 8 if min(tile_rows, tile_columns) >= 16 else 1
    group_rows, group_columns = triton.cdiv(tile_rows, group), triton.cdiv(tile_columns, group)
    groups = group_rows * (group_rows + 1) // 2 if symmetric else group_rows * group_columns
    programs = groups * group * group
    splits = min(triton.cdiv(WORKSPACE // block**2, programs), triton.cdiv(width, MIN_RANGE))
    column_range = triton.cdiv(triton.cdiv(width, splits), CHUNK.value) * CHUNK.value
    splits = triton.cdiv(width, column_range)
    partial = out
    if splits > 1:
        partial = out.new_empty((splits, programs, block, block))
    shared = {"SYMMETRIC": symmetric, "GROUP": group, "BLOCK": block, **FUSE}
    with on_device(out):
        gram_kernel[(programs, splits)](
            a, b, out, partial, rows, columns, width, group_columns, column_range,
            a.stride(0), b.stride(0), out.stride(0),
            SPLIT=splits > 1, DOUBLE=wide and a.dtype == torch.float32, SINGLE=not wide,
            PRECISION=INPUT_PRECISION[precision], BLOCK_K=block_k,
            num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
        if splits > 1:
            add_partial_kernel[(programs, block // SLICE)](
                partial, out, rows, columns, group_columns, splits, out.stride(0),
                SLICE=SLICE, **shared,
            )  # fmt: skip


def symmetric_update_(a: SymmetricUpdate) -> None:
    _add_product(a.gram, a.rows, a.rows, symmetric=True, double_products=a.double_products)


def cross_update_(a: CrossUpdate) -> None:
    _add_product(a.out, a.a, a.b, symmetric=False, double_products=a.double_products)
