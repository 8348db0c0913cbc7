"""Counter-based random numbers: the same on every device, batch size and thread count.

A number is a pure function of (seed, stream, index), by the op family `random_bits`; nothing is
drawn in sequence.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..._utils.workspace import scratch_of
from .. import random_bits
from . import as_int64, integer_seed
from .reference import KINDS

# Numbers from which torch sorts a vector by radix, on a CPU: 33,000 in a seventh of the time that
# the row of a matrix takes.
_RADIX = 1 << 15
# Keys whose sorted copy, which is not wanted, a CPU holds at once: 32 MB.
_SORTED_AT_ONCE = 1 << 22


def fold_in(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for a named purpose, independent of the seeds of other purposes.

    >>> fold_in(0, "train") == fold_in(0, "train"), fold_in(0, "train") == fold_in(0, "path")
    (True, False)
    """
    text = "\x1f".join([str(integer_seed(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def philox(counter: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Philox-4x32-10 at int64 counters of any shape: four words in [0, 2^32) each."""
    keys = torch.full((2, 1), as_int64(seed), dtype=torch.int64, device=counter.device)
    keys[1] = as_int64(stream)
    return random_bits.philox(counter.reshape(1, -1), *keys).reshape(*counter.shape, 4)


def words(
    count: int,
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Words `start` to `start + count` of a stream, each uniform in [0, 2^32).  # [count]"""
    return _drawn((count,), seed, stream, start, "words", torch.int64, device)


def _drawn(
    shape: tuple[int, ...],
    seed: int,
    stream: int,
    start: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    random_bits.fill_(
        out.view(1, 1, out.numel()), seed, kind=kind, first_stream=stream, start=start
    )
    return out


def uniform(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in (0, 1), from 32 bits each (a multiple of 2^-32, plus 2^-33)."""
    direct = dtype if dtype in KINDS["uniform"] else torch.float64
    return _drawn(shape, seed, stream, start, "uniform", direct, device).to(dtype)


def normal(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers by the Box-Muller transform of `uniform`, from `start` on."""
    count = math.prod(shape)
    skip = start % 2  # two uniform numbers make two normal ones
    u = uniform(
        (2 * ((count + skip + 1) // 2),), seed, stream, start=start - skip, device=device
    ).reshape(-1, 2)
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0]))
    angle = 2.0 * math.pi * u[:, 1]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
    return pairs.flatten()[skip : skip + count].reshape(shape).to(dtype)


def rademacher(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Signs, -1 or 1 with equal probability."""
    direct = dtype if dtype in KINDS["signs"] else torch.float64
    return _drawn(shape, seed, stream, 0, "signs", direct, device).to(dtype)


def rademacher_columns(
    size: int, seed: int, streams: range, *, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """Columns of signs, `rademacher` of one stream each, written in one launch.  # [size, K]

    Each column's numbers are adjacent in memory, as Hessian products read them.
    """
    rows = torch.empty(len(streams), 1, size, dtype=dtype, device=device)
    step = max(1, len(streams) if streams.step == 1 else 1)
    for i in range(0, len(streams), step):
        random_bits.fill_(rows[i : i + step], seed, kind="signs", first_stream=streams[i])
    return rows[:, 0].T


def permutation(
    n: int, seed: int, stream: int = 0, *, device: torch.device | str | None = None
) -> Tensor:
    """A random order of 0 .. n-1 (sorts 64-bit keys: equal keys have probability n^2 2^-64)."""
    keys = _drawn((n,), seed, stream, 0, "sort_keys", torch.int64, device)
    return torch.argsort(keys, stable=True)


def permutations(n: int, seeds: Tensor, stream: int = 0, streams: int = 1) -> Tensor:
    """Random orders of 0 .. n-1, those of `permutation` for each seed [S] and stream.  # [T, S, n]

    They are computed on the device of the seeds, for T consecutive streams.
    """
    parts, some = [], max(1, scratch_of(seeds.device).keys // max(1, n * len(seeds)))
    for t in range(0, max(1, streams), some):
        shape = (min(some, streams - t), len(seeds), n)
        keys = torch.empty(shape, dtype=torch.int64, device=seeds.device)
        random_bits.fill_(keys, seeds, kind="sort_keys", first_stream=stream + t)
        parts.append(_orders(keys))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _orders(keys: Tensor) -> Tensor:
    """What puts each row of keys [T, S, n] in order."""
    n = keys.shape[-1]
    if keys.device.type != "cpu":
        return torch.argsort(keys, dim=-1, stable=True)
    orders, some = (
        torch.empty_like(keys),
        1 if n >= _RADIX else max(1, _SORTED_AT_ONCE // max(1, n)),
    )
    rows, results = keys.flatten(0, 1), orders.flatten(0, 1)
    for i in range(0, len(rows), some):
        chosen = slice(i, i + some) if some > 1 else i  # a vector, not a row of a matrix
        torch.argsort(rows[chosen], dim=-1, stable=True, out=results[chosen])
    return orders
