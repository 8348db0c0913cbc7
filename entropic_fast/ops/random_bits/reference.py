"""Philox-4x32-10 in int64 tensor arithmetic, and the numbers that its words make.

Words 4 i to 4 i + 3 of a stream are the output at counter i (Salmon, Moraes, Dror, Shaw, *Parallel
random numbers: as easy as 1, 2, 3*, SC 2011). Number j of a stream is, by kind,

    words      word j, in [0, 2^32)                          int64
    uniform    (word j + 1/2) / 2^32, rounded to the dtype   float64, float32
    signs      1 where word j is at least 2^31, else -1      float64, float32, float16, bfloat16
    sort_keys  2^31 word 2 j XOR word 2 j + 1                int64, not negative
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops.random_bits.checks import KINDS as KINDS
from entropic_fast.ops.random_bits.checks import Fill, Philox

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
# Counters computed at once: 32 MB for each of a dozen temporary tensors.
_AT_ONCE = 1 << 22


def philox_words(counters: Tensor, seeds: Tensor, streams: Tensor) -> Tensor:
    """Four words in [0, 2^32) for each counter, seed and stream, int64, broadcast.  # [..., 4]"""
    # Of three shapes, from the second round on of the one that they are broadcast to.
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2, c3 = streams & _MASK, (streams >> 32) & _MASK
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, yet their 64 bits are those of the unsigned product.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def philox(a: Philox) -> Tensor:  # [m, n, 4]
    return philox_words(a.counters, a.seeds[:, None], a.streams[:, None])


def fill(a: Fill) -> None:
    out, seeds, start, kind = a.out, a.seeds, a.start, a.kind
    count = out.shape[2]
    if out.numel() == 0:
        return
    words = 2 if kind == "sort_keys" else 1
    first, last = words * start // 4, -(-words * (start + count) // 4)
    counters = torch.arange(first, last, dtype=torch.int64, device=out.device)
    if len(seeds) == 0:
        seeds = torch.full((1,), a.seed, dtype=torch.int64, device=out.device)
    streams = torch.arange(out.shape[0], dtype=torch.int64, device=out.device) + a.first_stream
    rows = max(1, _AT_ONCE // len(counters))
    skip = words * start - 4 * first
    for s in range(0, len(seeds), rows):
        some = max(1, rows // len(seeds[s : s + rows]))
        for t in range(0, len(streams), some):
            w = philox_words(
                counters, seeds[s : s + rows, None], streams[t : t + some, None, None]
            ).flatten(2)[..., skip : skip + words * count]
            out[t : t + some, s : s + rows].copy_(_numbers(w, kind, out.dtype))


def _numbers(words: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "words":
        return words
    if kind == "uniform":
        return ((words.to(torch.float64) + 0.5) * 2.0**-32).to(dtype)
    if kind == "signs":
        return (2 * (words >> 31) - 1).to(dtype)
    return (words[..., ::2] << 31) ^ words[..., 1::2]
