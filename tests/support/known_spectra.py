"""Symmetric matrices with given eigenvalues, in random directions."""

import torch
from torch import Tensor

from entropic_fast.ops.random_bits import streams as random


def with_spectrum(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix [P, P] in float64, and its eigenvectors in columns [P, P]."""
    vectors = torch.linalg.qr(random.normal((len(values), len(values)), seed))[0]
    matrix = (vectors * values.double()) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def decaying(size: int, rate: float = 0.7) -> Tensor:
    """Eigenvalues rate^i."""
    return rate ** torch.arange(size, dtype=torch.float64)


def spiked(size: int, spikes: int = 4, bulk: float = 0.05) -> Tensor:
    """A few large eigenvalues over a bulk of both signs, as Hessians of networks have."""
    values = bulk * torch.linspace(-1, 1, size, dtype=torch.float64)
    values[:spikes] = torch.linspace(20, 5, spikes, dtype=torch.float64)
    return values
