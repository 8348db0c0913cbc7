"""An operator across given directions: on what is orthogonal to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ..estimators.trace._deflation import project_out
from ._linear_operator import multiply


class Across:
    """(I - U U^T) A (I - U U^T), for orthonormal columns U [P, r].

    On vectors orthogonal to U it is Z^T A Z in the coordinates of an orthonormal basis Z of that
    space; along U it is 0.

    >>> import torch
    >>> A, u = torch.tensor([[2.0, 1.0], [1.0, 5.0]]), torch.tensor([[1.0], [0.0]])
    >>> (Across(A, u) @ torch.tensor([[3.0], [4.0]])).tolist()
    [[0.0], [20.0]]
    """

    def __init__(self, operator: Any, directions: Tensor) -> None:
        self.operator, self.directions = operator, directions
        self.shape = (len(directions), len(directions))
        self.dtype, self.device = directions.dtype, directions.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self._across(vectors, True)

    def unchecked(self, vectors: Tensor) -> Tensor:
        """The product, without a look at its values."""
        return self._across(vectors, False)

    def _across(self, vectors: Tensor, check: bool) -> Tensor:
        inside = without(self.directions, vectors).contiguous()
        return without(self.directions, multiply(self.operator, inside, check))


def without(directions: Tensor, vectors: Tensor) -> Tensor:
    """The part of vectors [P, K] orthogonal to orthonormal columns [P, r], in two passes."""
    return project_out(directions, project_out(directions, vectors))


def orthonormal(
    along: Tensor, size: int, dtype: torch.dtype, device: torch.device, name: str = "along"
) -> Tensor:
    """Orthonormal columns [P, r] that span the directions [P] or [P, r].

    Raises:
        ValueError: another shape, as many directions as P, values not finite, or directions
            that are zero or depend on one another.
    """
    if isinstance(along, Tensor) and along.ndim == 1:
        along = along[:, None]
    fits = isinstance(along, Tensor) and along.ndim == 2 and len(along) == size
    if not fits or not 1 <= along.shape[1] < size:
        raise checks.invalid(
            name, f"a tensor [{size}] or [{size}, r], r under {size}", checks.describe(along)
        )
    vectors = checks.finite(name, along).detach().to(device, torch.float64)
    lengths = torch.linalg.vector_norm(vectors, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    q, triangle = torch.linalg.qr(vectors / lengths)
    least = float(torch.linalg.svdvals(triangle)[-1])
    if least < 10 * torch.finfo(along.dtype).eps:
        raise checks.invalid(
            name, "independent directions other than zero", f"a least singular value of {least:.2g}"
        )
    directions: Tensor = q.to(dtype)
    return directions
