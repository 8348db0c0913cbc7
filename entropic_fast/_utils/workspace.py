"""Sizes of the temporaries of computations, one table for each kind of device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .devices import is_gpu

_MIB = 2**20


class Scratch(NamedTuple):
    """Sizes of temporaries, in bytes where nothing else is said.

    Attributes:
        products: float64 copies of scores and vectors in a Fisher product.
        norms: rows, and as many bytes of float64 copies, that norms are computed from.
        slice: rows made at once from records, for a Gram matrix.
        tile: inner products of positions computed at once.
        packed: rows that a Gram product copies.
        rotated: numbers of a basis multiplied at once when it is rotated in place.
        tall: rows of tall matrices converted to float64 at once.
        gram: any one temporary of a Gram product in plain PyTorch.
        segments: float64 numbers of differences of a path's pivots at once; 0 for one segment.
        keys: numbers sorted at once for random orders, 8 bytes each, and twice that for the
            results.
    """

    products: int
    norms: int
    slice: int
    tile: int
    packed: int
    rotated: int
    tall: int
    gram: int
    segments: int
    keys: int


# CPU: copies that stay in the caches, slices with enough columns that a product is not bound by
# memory, and smaller tiles, because these pass through the caches twice.
CPU = Scratch(
    products=_MIB,
    norms=4 * _MIB,
    slice=32 * _MIB,
    tile=8 * _MIB,
    packed=16 * _MIB,
    rotated=1 << 20,
    tall=1 << 16,
    gram=64 * _MIB,
    segments=0,
    keys=1 << 26,
)
# GPU: at some 3 TB/s 256 MiB pass through in 0.1 ms, 20 times what a launch costs the host. With
# the CPU's sizes a Fisher product of 1,024 scores had 40 launches per thousand parameters.
GPU = Scratch(
    products=256 * _MIB,
    norms=256 * _MIB,
    slice=256 * _MIB,
    tile=256 * _MIB,
    packed=256 * _MIB,
    rotated=1 << 26,
    tall=1 << 22,
    gram=256 * _MIB,
    segments=1 << 24,
    keys=1 << 26,
)


def scratch_of(device: torch.device) -> Scratch:
    return GPU if is_gpu(device) else CPU
