"""What the algorithms ask of an operator: `shape` (P, P), `dtype`, and `@` on [P] and [P, K].

`device` is the CPU where an operator does not say. Dense tensors qualify.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ...objective import Objective


class NonFiniteProductError(ValueError):
    """A product or quadratic form that is NaN or infinite."""


def not_finite(what: str) -> NonFiniteProductError:
    """The error for products or forms (`what`) of an operator that are not finite."""
    message = checks.invalid(
        "operator", f"finite {what}", "NaN or infinity", "check the point, or scale the operator"
    )
    return NonFiniteProductError(str(message))


def require_operator(operator: Any) -> tuple[int, torch.dtype, torch.device]:
    """Order, dtype and device of a square operator.

    Raises:
        ValueError: no shape, dtype or product; not square; empty; not of floating point.
    """
    if isinstance(operator, Objective):
        raise checks.invalid(
            "operator", "a matrix's products", "an Objective", "pass HessianOperator(obj)"
        )
    shape, dtype = getattr(operator, "shape", None), getattr(operator, "dtype", None)
    if shape is None or not hasattr(operator, "__matmul__"):
        raise checks.invalid(
            "operator", "something with shape, dtype and @", checks.describe(operator)
        )
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise checks.invalid("operator", "a square shape [P, P], P at least 1", str(list(shape)))
    if dtype not in (torch.float32, torch.float64):
        raise checks.invalid("operator", "dtype torch.float32 or torch.float64", str(dtype))
    return int(shape[0]), dtype, torch.device(getattr(operator, "device", "cpu"))


def multiply(operator: Any, vectors: Tensor, check: bool = True) -> Tensor:
    """operator @ vectors, refused if the shape is another or a value is not finite.

    Args:
        check: whether to look for values that are not finite, which waits for the device.
            Curvature operators look for themselves.
    """
    unchecked = None if check else getattr(operator, "unchecked", None)
    product = operator @ vectors if unchecked is None else unchecked(vectors)
    if not isinstance(product, Tensor) or product.shape != vectors.shape:
        raise checks.invalid(
            "operator", f"a product of shape {list(vectors.shape)}", checks.describe(product)
        )
    if check and not getattr(operator, "looks", False) and not checks.all_finite(product):
        raise not_finite("products")
    return product


@contextmanager
def without_shift(operator: Any) -> Iterator[tuple[Any, float]]:
    """An operator less the multiple of the identity it is known to have, and that multiple.

    What estimators sample is then what is unknown; weight decay is no part of it.
    """
    if not getattr(operator, "shift", 0.0) or not hasattr(operator, "without_shift"):
        yield operator, 0.0
        return
    inner = operator.without_shift()
    try:
        yield inner, operator.shift
    finally:
        operator.products = inner.products


def quadratic_forms(operator: Any, vectors: Tensor) -> Tensor:
    """v^T A v for the columns v of vectors [P, K], in float64.  # [K]

    By the operator's own `quadratic_forms` where it has one, which may cost half of a product;
    by products otherwise.

    Raises:
        ValueError: forms of another shape or not finite.

    >>> import torch
    >>> quadratic_forms(torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2, 1)).tolist()
    [3.0]
    """
    own = getattr(operator, "quadratic_forms", None)
    if own is None:
        return (vectors.double() * multiply(operator, vectors).double()).sum(0)
    forms = own(vectors)
    if not isinstance(forms, Tensor) or forms.shape != vectors.shape[1:]:
        raise checks.invalid(
            "operator",
            f"quadratic forms of shape {list(vectors.shape[1:])}",
            checks.describe(forms),
        )
    if not getattr(operator, "looks", False) and not checks.all_finite(forms):
        raise not_finite("quadratic forms")
    return forms.double()
