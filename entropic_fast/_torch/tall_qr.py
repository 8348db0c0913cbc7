"""QR factorizations of tall matrices: Householder's on a CPU, Cholesky's twice on a GPU.

LAPACK's factorization passes over a tall matrix once per column, and cuSOLVER's is slow on [P, b]
with P in the millions. CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44, 2015) is
four passes of matrix products: G = X^T X = R^T R, Q = X R^-1, and the same once more for Q. G and
products with R^-1 are float64, so it holds for condition numbers up to some 1e7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.devices import is_gpu
from .._utils.workspace import scratch_of

# Departure of Q^T Q from 1 after the first pass, beyond which the second is not trusted.
DEPARTURE = 0.1


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q [P, b] with orthonormal columns and R [b, b], upper triangular, for a matrix [P, b].

    On a GPU dependent columns fall back to Householder's. Waits for the device.
    """
    if is_gpu(matrix.device):
        q, triangle, holds = cholesky_qr(matrix)
        if bool(holds):
            return q, triangle
    householder: tuple[Tensor, Tensor] = torch.linalg.qr(matrix)
    return householder


def cholesky_qr(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and R (zeros where the factorization failed) and whether it holds, on the device."""
    if matrix.shape[1] == 0:
        empty = matrix.new_zeros(0, 0)
        return matrix, empty, torch.ones((), dtype=torch.bool, device=matrix.device)
    first, holds = _factor(_gram(matrix))
    q = _divided(matrix, first)
    gram = _gram(q)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    second, again = _factor(gram)
    holds = holds & again & ((gram - identity).abs().amax() < DEPARTURE)
    q = torch.where(holds, _divided(q, second), 0)
    triangle = torch.where(holds, second @ first, 0).to(matrix.dtype)
    return q, triangle, holds


def _gram(matrix: Tensor) -> Tensor:
    """X^T X in float64.  # [b, b]"""
    rows = scratch_of(matrix.device).tall
    total = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for i in range(0, len(matrix), rows):
        block = matrix[i : i + rows].double()
        total.addmm_(block.T, block)
    return total


def _factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = G, or the identity, and whether there is one."""
    lower, info = torch.linalg.cholesky_ex(gram)
    there = (info == 0) & torch.isfinite(lower).all()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.where(there, lower.T, identity), there


def _divided(matrix: Tensor, triangle: Tensor) -> Tensor:
    """X R^-1, in float64 one block of rows at a time.  # [P, b]"""
    identity = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    rows, out = scratch_of(matrix.device).tall, torch.empty_like(matrix)
    for i in range(0, len(matrix), rows):
        out[i : i + rows] = matrix[i : i + rows].double() @ inverse
    return out
