"""The geometry of a nudged elastic band: tangents, forces, insertion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def improved_tangents(pivots: Tensor, energies: Tensor) -> Tensor:
    """Unit tangents [M - 2, P] at the interior pivots [M, P], upwind by energy [M].

    Henkelman and Jonsson (J. Chem. Phys. 113, 9978, 2000), equations 8 to 11: toward the higher
    neighbor on a slope; at an extremum both directions, weighted by energy differences. A row is
    zero where a pivot and both neighbors coincide.
    """
    steps = pivots[1:] - pivots[:-1]
    backward, forward = steps[:-1], steps[1:]
    gaps = (energies[1:] - energies[:-1]).abs()
    largest, smallest = torch.maximum(gaps[1:], gaps[:-1]), torch.minimum(gaps[1:], gaps[:-1])
    rises = energies[2:] > energies[:-2]
    w_forward = torch.where(rises, largest, smallest)
    w_backward = torch.where(rises, smallest, largest)
    up, down = energies[1:] > energies[:-1], energies[1:] < energies[:-1]
    ascending, descending = up[:-1] & up[1:], down[:-1] & down[1:]
    slope = ascending | descending
    w_forward = torch.where(slope, ascending.to(w_forward.dtype), w_forward)
    w_backward = torch.where(slope, descending.to(w_backward.dtype), w_backward)
    flat = largest == 0  # three equal energies: the bisector
    w_forward, w_backward = w_forward.masked_fill(flat, 1.0), w_backward.masked_fill(flat, 1.0)
    # Scaled first, so that tiny energy differences do not underflow.
    scale = torch.maximum(w_forward, w_backward)
    tangents = _unit(
        (w_forward / scale)[:, None] * forward + (w_backward / scale)[:, None] * backward
    )
    lost = (tangents == 0).all(1, keepdim=True)  # a neighbor coincides, or a full turn
    return torch.where(lost, _unit(pivots[2:] - pivots[:-2]), tangents)


def band_gradients(
    pivots: Tensor, gradients: Tensor, tangents: Tensor, springs: float = torch.inf
) -> Tensor:
    """Gradients [M - 2, P] that the interior pivots descend.

    The energy's gradient without its part along the tangent; with finite springs k also minus the
    spring force k (|R_i+1 - R_i| - |R_i - R_i-1|) along it (equation 12 there).
    """
    along = (gradients * tangents).sum(1, keepdim=True)
    across: Tensor = gradients - along * tangents
    if springs == torch.inf:
        return across
    lengths = torch.linalg.vector_norm(pivots[1:] - pivots[:-1], dim=1)
    pull = springs * (lengths[1:] - lengths[:-1])
    sprung: Tensor = across - pull[:, None] * tangents
    return sprung


def insertions(
    s: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    is_pivot: Sequence[bool] | np.ndarray,
    threshold: float,
    room: int,
) -> list[float]:
    """Positions where the band misses a rise of the loss: at most one per gap, and `room` in all.

    Between neighboring pivots, the point where the loss most exceeds the linearly interpolated one,
    if by more than `threshold` times the range of all losses (Kolsbjerg, Groves and Hammer, J.
    Chem. Phys. 145, 094107, 2016); the largest excesses first.
    """
    s, losses = np.asarray(s, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    pivot = np.asarray(is_pivot, dtype=bool)
    if not np.isfinite(losses).all():  # an infinite loss is worse than all others, and not by inf
        finite = losses[np.isfinite(losses)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
        losses = np.where(np.isfinite(losses), losses, high + (high - low) + 1.0)
    excess = losses - np.interp(s, s[pivot], losses[pivot])
    limit = threshold * (losses.max() - losses.min())
    edges = np.flatnonzero(pivot)
    candidates: list[tuple[float, float]] = []
    for left, right in itertools.pairwise(edges):
        inside = np.arange(left + 1, right)
        if len(inside):
            best = inside[np.argmax(excess[inside])]
            if excess[best] > limit:
                candidates.append((float(excess[best]), float(s[best])))
    candidates.sort(reverse=True)
    return sorted(position for _, position in candidates[: max(0, room)])


def _unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = (rows / norms).masked_fill(norms == 0, 0.0)
    return unit
