"""Random sign vectors, how many to multiply at once, and the judgment of their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._utils.convergence import warn_not_converged
from ..._utils.results import Estimate
from ..._utils.workspace import scratch_of
from ...ops.random_bits import streams as random

# Vectors given to an operator at once: from 8 on they share the work that does not depend on them.
BLOCK = 8
# Samples before a tolerance may stop. The standard error of 16 normal samples comes out under half
# of what it is in 1 run of 640; that of 8 in 1 of 36.
MIN_SAMPLES = 16


def sign_vectors(
    size: int, seed: int, indices: range, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sign vectors number `indices` of a seed, independent of the others.  # [P, K]"""
    return random.rademacher_columns(size, seed, indices, dtype=dtype, device=device)


def block_width(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Vectors to multiply at once, such that four blocks of them fit the memory."""
    fits = resolve_budget(None, device) // (4 * size * torch.finfo(dtype).bits // 8)
    return max(1, min(BLOCK, fits))


def unit_vectors(
    size: int, dtype: torch.dtype, device: torch.device, width: int
) -> Iterator[Tensor]:
    """All unit vectors, in blocks [P, width]."""
    for start in range(0, size, width):
        units = torch.zeros(size, min(width, size - start), dtype=dtype, device=device)
        units[start : start + width].fill_diagonal_(1)
        yield units


def column_norms(vectors: Tensor) -> Tensor:
    """Norms [K] of the columns of vectors [P, K], in float64."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
    return norms


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float64, on the CPU, for tall a [P, m] and b [P, n].  # [m, n]"""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    rows = scratch_of(a.device).tall
    for i in range(0, len(a), rows):
        total.addmm_(a[i : i + rows].double().T, b[i : i + rows].double())
    return total.cpu()


def judged(estimates: list[Estimate], total: Estimate, tol: float | None) -> list[Estimate]:
    """Estimates that say whether their total met its tolerance; a warning if it did not."""
    if tol is None or precise(total, tol):
        return estimates
    warn_not_converged(
        f"trace: a standard error of {total.std_error:.3g} against tol |value| = "
        f"{tol * abs(total.value):.3g} after {total.samples} samples; raise probes or tol, or "
        "deflate known directions (tol is relative: where positive and negative "
        "eigenvalues cancel, judge the standard error by itself)"
    )
    return [dataclasses.replace(estimate, converged=False) for estimate in estimates]


def precise(estimate: Estimate, tol: float) -> bool:
    """Whether the standard error is within tol of the value's size."""
    return estimate.std_error <= tol * abs(estimate.value)
