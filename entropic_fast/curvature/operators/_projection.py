"""Orthonormal directions, and vectors without their components along them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._utils import checks


def project_out(basis: Tensor, vectors: Tensor) -> Tensor:
    """Vectors [P] or [P, K] less their components in an orthonormal basis [P, r], in one pass."""
    return vectors - basis @ (basis.T @ vectors) if basis.shape[1] else vectors


def without(basis: Tensor, vectors: Tensor) -> Tensor:
    """Vectors [P] or [P, K] less their components in an orthonormal basis [P, r], in two passes."""
    return project_out(basis, project_out(basis, vectors))


def orthonormal(
    directions: Tensor, size: int, dtype: torch.dtype, device: torch.device, name: str = "along"
) -> Tensor:
    """Orthonormal columns [P, r] that span independent directions [P] or [P, r], with r < P."""
    if isinstance(directions, Tensor) and directions.ndim == 1:
        directions = directions[:, None]
    fits = isinstance(directions, Tensor) and directions.ndim == 2 and len(directions) == size
    if not fits or not 1 <= directions.shape[1] < size:
        raise checks.invalid(
            name, f"a tensor [{size}] or [{size}, r], r under {size}", checks.describe(directions)
        )
    vectors = checks.finite(name, directions).detach().to(device, torch.float64)
    lengths = torch.linalg.vector_norm(vectors, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    q, triangle = torch.linalg.qr(vectors / lengths)
    least = float(torch.linalg.svdvals(triangle)[-1])
    if least < 10 * torch.finfo(directions.dtype).eps:
        raise checks.invalid(
            name, "independent directions other than zero", f"a least singular value of {least:.2g}"
        )
    basis: Tensor = q.to(dtype)
    return basis
