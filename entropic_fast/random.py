"""Counter-based random numbers: the same on every device, batch size and thread count.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*,
SC 2011), written in int64 tensor arithmetic so that it runs wherever the data are. A number
is a pure function of (seed, stream, index); nothing is drawn in sequence, so nothing depends
on who draws first.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def derive(seed: int, *names: str | int) -> int:
    """A seed for a named purpose, independent of the seeds of other purposes.

    Returns:
        a whole number in [0, 2^63).

    >>> derive(0, "train") == derive(0, "train"), derive(0, "train") == derive(0, "path")
    (True, False)
    """
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def philox(counter: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Philox-4x32-10 at given counters.

    Args:
        counter: int64 counters, any shape; the low and high 32 bits are the first two words.
        seed: the key, in [0, 2^64).
        stream: the last two counter words, in [0, 2^64).

    Returns:
        four words in [0, 2^32) a counter, int64.  # [..., 4]
    """
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = torch.full_like(c0, stream & _MASK)
    c3 = torch.full_like(c0, (stream >> 32) & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
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


def words(
    count: int,
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Words `start` to `start + count` of a stream, each uniform in [0, 2^32).  # [count]"""
    first, last = start // 4, -(-(start + count) // 4)
    counter = torch.arange(first, last, dtype=torch.int64, device=device)
    return philox(counter, seed, stream).flatten()[start - 4 * first :][:count]


def uniform(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in (0, 1), from 32 bits each (a multiple of 2^-32, plus 2^-33).

    They are those of the stream from number `start` on.

    >>> u = uniform((1000,), seed=0)
    >>> bool(((u > 0) & (u < 1)).all())
    True
    """
    w = words(math.prod(shape), seed, stream, start=start, device=device)
    return ((w.to(torch.float64) + 0.5) * 2.0**-32).reshape(shape).to(dtype)


def normal(
    shape: tuple[int, ...],
    seed: int,
    stream: int = 0,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers by the Box-Muller transform of `uniform`, from `start` on.

    >>> bool(normal((4000,), seed=1).std().sub(1).abs() < 0.05)
    True
    """
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
    """Signs, -1 or 1 with equal probability.

    >>> sorted(set(rademacher((100,), seed=3).tolist()))
    [-1.0, 1.0]
    """
    bits = words(math.prod(shape), seed, stream, device=device) >> 31
    return (2 * bits - 1).reshape(shape).to(dtype)


def permutation(
    n: int, seed: int, stream: int = 0, *, device: torch.device | str | None = None
) -> Tensor:
    """A random order of 0 .. n-1 (sorts 64-bit keys: equal keys have probability n^2 2^-64).

    >>> sorted(permutation(5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    w = words(2 * n, seed, stream, device=device).reshape(-1, 2)
    return torch.argsort((w[:, 0] << 31) ^ w[:, 1], stable=True)
