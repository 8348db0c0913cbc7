"""Arguments of family `random_bits`, and what is required of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import describe, invalid, one_of

# The kinds of numbers (see `reference`) and the dtypes of each.
KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "words": (torch.int64,),
    "uniform": (torch.float64, torch.float32),
    "signs": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "sort_keys": (torch.int64,),
}

# Numbers of a stream: 64 bits hold twice as many words.
LARGEST_INDEX = 2**62


class Fill(NamedTuple):
    out: Tensor  # [T, S, n] any strides, written
    seeds: Tensor  # [S] int64, or [0]: `seed` is the only one
    seed: int
    first_stream: int
    start: int
    kind: str
    backend: str  # "" for the one in force


class Philox(NamedTuple):
    counters: Tensor  # [m, n] int64, any strides
    seeds: Tensor  # [m] int64
    streams: Tensor  # [m] int64
    backend: str  # "" for the one in force


def new_words(a: Philox) -> Tensor:  # [m, n, 4]
    return a.counters.new_empty((*a.counters.shape, 4))


def check_fill(a: Fill) -> None:
    out, seeds = a.out, a.seeds
    one_of("kind", a.kind, KINDS)
    if out.dim() != 3 or out.dtype not in KINDS[a.kind]:
        names = " or ".join(str(d).removeprefix("torch.") for d in KINDS[a.kind])
        raise invalid("out", f"shape [streams, seeds, n] of {names}", describe(out))
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or len(seeds) not in (0, out.shape[1]):
        raise invalid("seeds", f"shape [{out.shape[1]}] of int64", describe(seeds))
    if len(seeds) == 0 and out.shape[1] > 1:
        raise invalid("seeds", f"{out.shape[1]} of them, as out has so many", "one")
    if seeds.device != out.device:
        raise invalid("seeds", f"a tensor on {out.device}, as out", str(seeds.device))
    if not 0 <= a.start <= LARGEST_INDEX - out.shape[2]:
        last = f"numbers {a.start} to {a.start + out.shape[2]}"
        raise invalid("start", "numbers from 0 to 2^62 of a stream", last)


def check_memory(a: Fill) -> None:
    if torch._debug_has_internal_overlap(a.out) == 1:
        raise invalid("out", "memory of its own for each number", f"strides {a.out.stride()}")


def check_philox(a: Philox) -> None:
    counters = a.counters
    if counters.dim() != 2 or counters.dtype != torch.int64:
        raise invalid("counters", "shape [m, n] of int64", describe(counters))
    for name, tensor in (("seeds", a.seeds), ("streams", a.streams)):
        if tensor.dtype != torch.int64 or tensor.shape != counters.shape[:1]:
            raise invalid(name, f"shape [{len(counters)}] of int64", describe(tensor))
        if tensor.device != counters.device:
            expected = f"a tensor on {counters.device}, as counters"
            raise invalid(name, expected, str(tensor.device))
