"""The protocol of linear operators, and checks of what they multiply and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..._utils import checks
from ..._utils.devices import is_gpu


@runtime_checkable
class LinearOperator(Protocol):
    """A real matrix that is given by its products with vectors.

    Every estimator of this package takes any object with these three members, among them dense
    tensors. Optional members are used where an object has them: `device` (otherwise the CPU),
    `quadratic_forms(V)` for the columns of V [P, K], `symmetric`, and `T`.

    Example:
        >>> isinstance(torch.eye(2), LinearOperator)
        True
    """

    @property
    def shape(self) -> Sequence[int]:
        """(P, P)."""

    @property
    def dtype(self) -> torch.dtype:
        """torch.float32 or torch.float64, of vectors and products."""

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """The product with a vector [P] or with the columns of a matrix [P, K]."""


class NonFiniteProductError(ValueError):
    """A product or quadratic form that is NaN or infinite."""


def not_finite(what: str) -> NonFiniteProductError:
    message = checks.invalid(
        "operator", f"finite {what}", "NaN or infinity", "check the point, or scale the operator"
    )
    return NonFiniteProductError(str(message))


def require_vectors(vectors: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Vectors [size] or [size, K] that an operator can multiply.

    On a GPU `finite_together` checks that they are finite along with their product, which waits for
    the device once instead of twice.
    """
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(vectors) != size:
        raise checks.invalid(
            "vectors", f"a tensor of shape [{size}] or [{size}, K]", checks.describe(vectors)
        )
    if vectors.dtype != dtype or vectors.device != device:
        raise checks.invalid(
            "vectors",
            f"{dtype} on {device}",
            f"{vectors.dtype} on {vectors.device}",
            "convert them with vectors.to(operator.device, operator.dtype)",
        )
    checked: Tensor = vectors if is_gpu(device) else checks.finite("vectors", vectors)
    checked = checked.detach()
    return checked.clone() if checked.is_inference() else checked


def finite_together(result: Tensor, vectors: Tensor) -> bool:
    """Whether a result is finite and, on a GPU, the vectors are too."""
    return (
        checks.all_finite(result, vectors) if is_gpu(result.device) else checks.all_finite(result)
    )
