"""What curvature operators share: checks, blocks of vectors, other libraries' ways to multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch.torch_compile import CompileSafe, clean_dispatch_state, forms_operation
from ..._utils import checks
from ..._utils.devices import is_gpu
from ...objective import Objective
from ...objective._objective import require_objective
from ._linear_operator import NonFiniteProductError


class CurvatureOperator(CompileSafe):
    """A symmetric matrix [P, P] known by its products; base of the operators.

    `operator @ vectors` and `quadratic_forms` work in functions compiled by `torch.compile`, as
    one operation of the graph. Vectors [P, P] must be written operator.multiply(vectors) there.

    Attributes:
        shape: (P, P).
        dtype, device: of the vectors it multiplies, the objective's.
        obj, theta: the objective and the point.
        symmetric: true, so that what products lack of it is taken for rounding.
        products: operator-vector products computed so far; those behind quadratic forms too,
            where they are not had without.
    """

    name = "operator"
    symmetric = True
    takes_half = False  # whether the model may be in half precision
    needs_outputs = False  # whether it is of the model's outputs

    def __init__(self, obj: Objective, theta: Tensor | None = None) -> None:
        require_objective(obj)
        if not self.takes_half:
            checks.single_or_double("obj", obj.dtype, self.name)
        if self.needs_outputs:
            obj.require_outputs(self.name)
        self.obj = obj
        with torch.inference_mode(False):
            self.theta = obj.point(theta).clone()
        self.shape = (obj.num_params, obj.num_params)
        self.dtype, self.device = obj.dtype, obj.device
        self.products = 0
        super().__init__()

    def _multiply(self, vectors: Tensor) -> Tensor:
        """The product with a vector [P] or the columns of a matrix [P, K].

        Raises:
            ValueError: vectors of another shape, dtype or device, or not finite; a product
                that is not finite.
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        columns = self._columns(vectors)
        product = self._product(columns)
        if not finite_together(product, columns):
            checks.finite("vectors", vectors)
            product = self._finite(self._product_otherwise(columns, product))
        self.products += product.shape[1]
        return product.reshape(vectors.shape).contiguous()

    def unchecked(self, vectors: Tensor) -> Tensor:
        """The product without a look at its values, or at those of vectors: nothing waits for it.

        Where it is not finite, `operator @ vectors` says why, or has it by autograd.
        """
        with clean_dispatch_state():
            product = self._product(self._columns(vectors))
            self.products += product.shape[1]
            return product.reshape(vectors.shape).contiguous()

    def _finite(self, result: Tensor) -> Tensor:
        if not checks.all_finite(result):
            raise NonFiniteProductError(
                f"{self.name}: expected a finite product, got NaN or infinity at a point of norm "
                f"{float(self.theta.norm()):.4g}, where the loss is finite; look for a function "
                "without a second derivative there, or overflow"
            )
        return result

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        """v^T A v for each column v of vectors [P, K], in float64.  # [K]

        Raises:
            ValueError, NonFiniteLossError: as products.
        """
        if torch.compiler.is_compiling():
            compiled: Tensor = forms_operation(vectors.detach(), self._number)
            return compiled
        with clean_dispatch_state():
            columns = self._columns(vectors)
            forms = self._forms(columns)
            if not finite_together(forms, columns):
                checks.finite("vectors", vectors)
                forms = self._finite(self._forms_otherwise(columns, forms))
            return forms

    def _columns(self, vectors: Tensor) -> Tensor:
        """Vectors fit to be multiplied, but that a GPU's may be NaN or infinite.  # [P, K]"""
        checked = require_vectors(vectors, self.shape[0], self.dtype, self.device)
        return checked.reshape(self.shape[0], -1)

    def _product(self, columns: Tensor) -> Tensor:
        """The product with columns [P, K]; it may be NaN or infinite."""
        raise TypeError("use HessianOperator, GGNOperator or FisherOperator")

    def _product_otherwise(self, columns: Tensor, product: Tensor) -> Tensor:
        """Another product where `product` is not finite; the same where there is no other way."""
        return product

    def _forms(self, columns: Tensor) -> Tensor:
        """v^T A v for columns v [P, K].  # [K] float64"""
        products = self._product(columns)
        self.products += products.shape[1]
        return (columns.double() * products.double()).sum(0)

    def _forms_otherwise(self, columns: Tensor, forms: Tensor) -> Tensor:
        """Other forms where `forms` are not finite: by products."""
        products = self._product(columns)
        if not checks.all_finite(products):
            products = self._product_otherwise(columns, products)
        self.products += products.shape[1]
        return (columns.double() * products.double()).sum(0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.shape[0]}, N={self.obj.num_examples})"


def finite_together(result: Tensor, vectors: Tensor) -> bool:
    """Whether a result is finite and so are the vectors, which on a CPU were looked at before."""
    return (
        checks.all_finite(result, vectors) if is_gpu(result.device) else checks.all_finite(result)
    )


def require_vectors(vectors: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Vectors [size] or [size, K] that an operator can multiply.

    Those on a GPU may be NaN or infinite: they are looked at together with their product.
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
    found: Tensor = vectors if is_gpu(device) else checks.finite("vectors", vectors)
    found = found.detach()
    return found.clone() if found.is_inference() else found
