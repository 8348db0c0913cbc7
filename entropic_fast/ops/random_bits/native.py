"""Family `random_bits` on the compiled module: C++ on the CPU, CUDA C++ on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.random_bits.checks import KINDS, Fill, Philox, new_words

# In the order of RandomType in csrc/kernels/random_bits.h.
DTYPES = (torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16)


def fill(a: Fill) -> None:
    seeds = a.seeds.contiguous()
    native.call(
        "random_fill", a.out, a.out, *a.out.shape, *a.out.stride(),
        seeds if len(seeds) else None, a.seed, a.first_stream, a.start,
        tuple(KINDS).index(a.kind), DTYPES.index(a.out.dtype),
    )  # fmt: skip


def philox(a: Philox) -> Tensor:
    words, seeds, streams = new_words(a), a.seeds.contiguous(), a.streams.contiguous()
    native.call(
        "random_philox", a.counters, a.counters, seeds, streams, words,
        *a.counters.shape, *a.counters.stride(),
    )  # fmt: skip
    return words
