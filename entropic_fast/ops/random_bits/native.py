"""Family `random_bits` on the compiled module: C++ for CPU tensors, CUDA C++ for CUDA tensors.

Called by `entropic_fast.ops.random_bits` with checked tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.random_bits.reference import KINDS

# In the order of RandomType in csrc/kernels/random_bits.h.
DTYPES = (torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _call(op: str, device: torch.device, values: tuple[Any, ...]) -> None:
    module = native.module()
    if device.type == "cpu":
        getattr(module, f"{op}_cpu")(values, native.threads())
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(module, f"{op}_cuda")(values, device.index, stream)


def fill(
    out: Tensor,  # [T, S, n] written
    seeds: Tensor,  # [S] int64, or [0]: `seed` is the only one
    seed: int,
    first_stream: int,
    start: int,
    kind: str,
) -> None:
    keys = seeds.data_ptr() if len(seeds) else 0
    _call("random_fill", out.device, (
        out.data_ptr(), *out.shape, *out.stride(), keys, seed, first_stream, start,
        tuple(KINDS).index(kind), DTYPES.index(out.dtype),
    ))  # fmt: skip


def philox(
    counters: Tensor,  # [m, n] int64
    seeds: Tensor,  # [m] int64
    streams: Tensor,  # [m] int64
) -> Tensor:  # [m, n, 4] int64
    out = torch.empty((*counters.shape, 4), dtype=torch.int64, device=counters.device)
    _call("random_philox", counters.device, (
        counters.data_ptr(), seeds.data_ptr(), streams.data_ptr(), out.data_ptr(),
        *counters.shape, *counters.stride(),
    ))  # fmt: skip
    return out
