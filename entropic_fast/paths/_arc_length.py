"""A polyline by its relative arc length: functions of tensors that never wait for a device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .._utils.workspace import scratch_of


def segment_lengths(pivots: Tensor) -> Tensor:
    """Euclidean length of each segment, float64, without a float64 copy of the pivots.  # [M - 1]

    On a CPU one segment at a time; on a GPU all at once, over as many parameters as the scratch
    allows (one pass for 9 pivots of a ResNet-20).
    """
    at_once = scratch_of(pivots.device).segments
    if not at_once:
        pairs = itertools.pairwise(pivots)
        return torch.stack([torch.linalg.vector_norm(b.double() - a.double()) for a, b in pairs])
    columns = max(1, at_once // len(pivots))
    starts = range(0, pivots.shape[1], columns)
    columnwise = (pivots[:, i : i + columns].double().diff(dim=0) for i in starts)
    norms = [torch.linalg.vector_norm(differences, dim=1) for differences in columnwise]
    lengths: Tensor = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    return lengths


def length(pivots: Tensor) -> Tensor:
    """Arc length of a path through the pivots, float64.  # []"""
    return segment_lengths(pivots).cumsum(0)[-1]  # the same bits as the last of `measured`


def measured(pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Arc length [] and relative positions [M] of the pivots, float64, from 0 to 1."""
    lengths = segment_lengths(pivots)
    arc = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return arc[-1], arc / arc[-1]


def located(positions: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The segment that holds each s [K] in [0, 1], int64, and the fraction along it, float64.

    A position at a pivot belongs to the segment that begins there (the end, to the last). Segments
    of length 0 are never returned: of equal positions, the last begins a longer segment.
    """
    after = torch.searchsorted(positions, s, right=True)
    after = torch.minimum(after, torch.searchsorted(positions, positions[-1:]))
    # NaN positions, of pivots that are not finite, must not lead out of the table.
    index = (after - 1).clamp(0, len(positions) - 2)
    left, right = positions[index], positions[1:][index]
    return index, ((s - left) / (right - left)).clamp(0.0, 1.0)


def points_at(pivots: Tensor, positions: Tensor, s: Tensor) -> Tensor:
    """Points at positions s [K]; at a pivot's position, exactly that pivot.  # [K, P]"""
    index, t = located(positions, s)
    points: Tensor = torch.lerp(pivots[index], pivots[1:][index], t[:, None].to(pivots.dtype))
    return points


def resampled(pivots: Tensor, positions: Tensor, count: int) -> Tensor:
    """`count` pivots at equal arc length along the path, the ends unchanged.  # [count, P]"""
    s = torch.linspace(0, 1, count, dtype=torch.float64, device=positions.device)
    points = points_at(pivots, positions, s)
    points[0], points[-1] = pivots[0], pivots[-1]
    return points
