"""Family `random_bits` in Triton: a program makes the words of a tile of streams and counters."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import on_device
from entropic_fast.ops.random_bits.checks import KINDS, Fill, Philox, new_words

# Counters of a program: two for each of 128 threads, so four 16-byte stores of float32.
BLOCK = 256
# Rows (pairs of a stream and a seed) of a tile at most: they share one where they are short, and
# where rows, not the numbers of a row, are adjacent in memory, so that what is written together
# lies together.
ROWS = 32


@triton.jit
def words_of(counter, stream, key):
    """Four words (uint32) for each counter, stream and key (int64, of one shape)."""
    return tl.philox(
        key,
        (counter & 0xFFFFFFFF).to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        (stream & 0xFFFFFFFF).to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )


@triton.jit(do_not_specialize=["key", "first_stream", "first_counter", "start"])
def fill_kernel(
    out, keys, rows, seeds, count, counters, stream_stride, seed_stride, stride,
    key, first_stream, first_counter, start,
    KIND: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Numbers of ROWS rows at COUNTERS counters."""
    NUMBERS: tl.constexpr = 2 if KIND == 3 else 4
    parts = tl.cdiv(counters, COUNTERS)
    program = tl.program_id(0).to(tl.int64)
    row = program // parts * ROWS + tl.arange(0, ROWS).to(tl.int64)
    c = program % parts * COUNTERS + tl.arange(0, COUNTERS).to(tl.int64)
    inside = row < rows
    seed_number = row % seeds
    stream_number = row // seeds
    if MANY:
        seed = tl.load(keys + seed_number, mask=inside, other=0)
    else:
        seed = tl.cast(key, tl.int64) + tl.zeros([ROWS], tl.int64)
    zeros = tl.zeros([ROWS, COUNTERS], tl.int64)
    counter = tl.cast(first_counter, tl.int64) + c
    stream = tl.cast(first_stream, tl.int64) + stream_number
    w0, w1, w2, w3 = words_of(
        counter[None, :] + zeros, stream[:, None] + zeros, seed[:, None] + zeros
    )
    if KIND == 3:  # sort_keys
        first = (w0.to(tl.int64) << 31) ^ w1.to(tl.int64)
        value = tl.interleave(first, (w2.to(tl.int64) << 31) ^ w3.to(tl.int64))
    else:
        w = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        if KIND == 0:  # words
            value = w.to(tl.int64)
        elif KIND == 1:  # uniform
            value = ((w.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10).to(
                out.dtype.element_ty
            )
        else:  # signs
            value = tl.where(w >= 2147483648, 1.0, -1.0).to(out.dtype.element_ty)
    j = (tl.cast(first_counter, tl.int64) + program % parts * COUNTERS) * NUMBERS
    j = j - tl.cast(start, tl.int64) + tl.arange(0, NUMBERS * COUNTERS).to(tl.int64)
    base = out + stream_number * stream_stride + seed_number * seed_stride
    mask = inside[:, None] & (j >= 0)[None, :] & (j < count)[None, :]
    tl.store(base[:, None] + (j * stride)[None, :], value, mask=mask)


@triton.jit
def philox_kernel(
    counters, keys, streams, out, rows, count, row_stride, stride, BLOCK: tl.constexpr
):
    """Four words for each of BLOCK counters."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.cast(rows, tl.int64) * count
    mask = at < total
    row = at // count
    counter = tl.load(counters + row * row_stride + at % count * stride, mask=mask, other=0)
    key = tl.load(keys + row, mask=mask, other=0)
    stream = tl.load(streams + row, mask=mask, other=0)
    w0, w1, w2, w3 = words_of(counter, stream, key)
    w = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    to = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + to, w, mask=to < 4 * total)


def fill(a: Fill) -> None:
    out, seeds, start, kind = a.out, a.seeds.contiguous(), a.start, a.kind
    streams, several, count = out.shape
    rows = streams * several
    if out.numel() == 0:
        return
    numbers = 2 if kind == "sort_keys" else 4
    first = start // numbers
    counters = (start + count - 1) // numbers + 1 - first
    across = abs(out.stride(1 if several > 1 else 0)) < abs(out.stride(2))
    tile = min(ROWS, triton.next_power_of_2(rows))
    if not across:
        tile = min(tile, max(1, BLOCK // triton.next_power_of_2(counters)))
    grid = (triton.cdiv(rows, tile) * triton.cdiv(counters, BLOCK // tile),)
    with on_device(out):
        fill_kernel[grid](
            out, seeds if len(seeds) else out, rows, several, count, counters, *out.stride(),
            a.seed, a.first_stream, first, start,
            KIND=tuple(KINDS).index(kind), MANY=len(seeds) > 0, ROWS=tile, COUNTERS=BLOCK // tile,
            num_warps=4,
        )  # fmt: skip


def philox(a: Philox) -> Tensor:
    words: Tensor = new_words(a)
    rows, count = a.counters.shape
    if a.counters.numel() > 0:
        with on_device(words):
            philox_kernel[(triton.cdiv(rows * count, BLOCK),)](
                a.counters, a.seeds.contiguous(), a.streams.contiguous(), words,
                rows, count, *a.counters.stride(),
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return words
