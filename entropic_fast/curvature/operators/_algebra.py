"""Operators as expressions: sums, multiples, transposes and projections of linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..._torch.torch_compile import CompileSafe, clean_dispatch_state, forms_operation
from ..._utils import checks
from ...objective import Objective
from ._linear_operator import LinearOperator, finite_together, not_finite, require_vectors
from ._projection import orthonormal, without


class OperatorBase(CompileSafe):
    """Base class of operators: checked products, quadratic forms and algebra.

    `A + B`, `A - B`, `c * A`, `A / c` and `-A` are operators; B may be anything that `as_operator`
    accepts. In functions compiled by `torch.compile` a product with a square matrix [P, P] must be
    written `operator.multiply(V)`. A subclass implements `_product`, and `_product_otherwise` if it
    has a second method.

    Attributes:
        shape: (rows, columns).
        symmetric: whether the asymmetry of computed products is known to be rounding.
        products: operator-vector products so far, those inside quadratic forms included.
    """

    name = "operator"

    @property
    def shift(self) -> float:
        """The multiple of the identity that this matrix is known to contain."""
        return 0.0

    def __init__(self) -> None:
        self.products = 0
        super().__init__()

    @property
    def order(self) -> int:
        """P, of a square operator [P, P]."""
        return self.shape[0]

    # -- products --------------------------------------------------------------------------

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with a vector [P] or with the columns of a matrix [P, K]."""
        if torch.compiler.is_compiling():
            return self.multiply(vectors)
        with clean_dispatch_state():
            columns = self._columns(vectors)
            product = self._product(columns)
            if not finite_together(product, columns):
                checks.finite("vectors", vectors)
                product = self._finite(self._product_otherwise(columns, product))
            self.products += product.shape[1]
            return product.reshape(self.shape[0], *vectors.shape[1:]).contiguous()

    def unchecked(self, vectors: Tensor) -> Tensor:
        """The product without a check that it is finite, and so without waiting for the device.

        If it is not, `operator @ vectors` raises the error that says why, or falls back to
        autograd.
        """
        with clean_dispatch_state():
            product = self._product(self._columns(vectors))
            self.products += product.shape[1]
            return product.reshape(self.shape[0], *vectors.shape[1:]).contiguous()

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        """v^T A v in float64 [K] for the columns v of vectors [P, K]."""
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
        """Vectors fit to be multiplied, as columns [P, K]; on a GPU they may not be finite."""
        checked = require_vectors(vectors, self.shape[1], self.dtype, self.device)
        return checked.reshape(self.shape[1], -1)

    def _product(self, columns: Tensor) -> Tensor:
        """The product with columns [P, K], which may be NaN or infinite."""
        raise TypeError(f"{type(self).__name__} has no products")

    def _product_otherwise(self, columns: Tensor, product: Tensor) -> Tensor:
        """The product by a second method, where `product` is not finite."""
        return product

    def _forms(self, columns: Tensor) -> Tensor:
        """Quadratic forms [K] in float64, which may be NaN or infinite."""
        products = self._product(columns)
        self.products += products.shape[1]
        return (columns.double() * products.double()).sum(0)

    def _forms_otherwise(self, columns: Tensor, forms: Tensor) -> Tensor:
        """Quadratic forms from products, where `forms` are not finite."""
        products = self._product(columns)
        if not checks.all_finite(products):
            products = self._product_otherwise(columns, products)
        self.products += products.shape[1]
        return (columns.double() * products.double()).sum(0)

    def _finite(self, result: Tensor) -> Tensor:
        if not checks.all_finite(result):
            raise not_finite("products")
        return result

    def cache_primals(self) -> None:
        """Announce that more products follow, so that the next may keep what they share."""

    def without_shift(self) -> OperatorBase:
        """This matrix without its known multiple of the identity."""
        return self

    # -- algebra ---------------------------------------------------------------------------

    @property
    def T(self) -> OperatorBase:
        return self if self.symmetric else self._transposed()

    def _transposed(self) -> OperatorBase:
        raise checks.invalid("operator", "one with a transpose T", repr(self))

    def __add__(self, other: LinearOperator | Tensor) -> OperatorBase:
        return SumOperator([(1.0, self), (1.0, _operand(other))])

    def __sub__(self, other: LinearOperator | Tensor) -> OperatorBase:
        return SumOperator([(1.0, self), (-1.0, _operand(other))])

    def __radd__(self, other: LinearOperator | Tensor) -> OperatorBase:
        return SumOperator([(1.0, _operand(other)), (1.0, self)])

    def __rsub__(self, other: LinearOperator | Tensor) -> OperatorBase:
        return SumOperator([(1.0, _operand(other)), (-1.0, self)])

    def __mul__(self, factor: float | Tensor) -> OperatorBase:
        if not (isinstance(factor, Real) or (isinstance(factor, Tensor) and factor.ndim == 0)):
            return NotImplemented
        return SumOperator([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> OperatorBase:
        return self * (1 / factor)

    def __neg__(self) -> OperatorBase:
        return self * -1.0

    def projected(self, directions: Tensor) -> OperatorBase:
        """N A N, where N projects onto the orthogonal complement of directions [P] or [P, r].

        >>> A, u = torch.tensor([[2.0, 1.0], [1.0, 5.0]]), torch.tensor([1.0, 0.0])
        >>> (as_operator(A).projected(u) @ torch.tensor([3.0, 4.0])).tolist()
        [0.0, 20.0]
        """
        size = self.shape[1]
        basis = orthonormal(directions, size, self.dtype, self.device, "directions")
        return ProjectedOperator(self, basis)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _REFLECTED and isinstance(args[1], OperatorBase):  # matrix + A, 0-dim * A
            method, ndim = _REFLECTED[func]
            if args[0].ndim == ndim:
                return getattr(args[1], method)(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def to_scipy(self) -> Any:
        """This operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(array: Any, operator: OperatorBase = self) -> Any:
            values = torch.as_tensor(np.array(array), dtype=self.dtype, device=self.device)
            return (operator @ values).cpu().numpy()

        def transposed(array: Any) -> Any:  # not every operator has a transpose
            return product(array, self.T)

        return ScipyOperator(
            self.shape,
            matvec=product,
            matmat=product,
            rmatvec=transposed,
            rmatmat=transposed,
            dtype=np.float32 if self.dtype == torch.float32 else np.float64,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}, {self.shape[1]})"


_REFLECTED = {Tensor.add: ("__radd__", 2), Tensor.sub: ("__rsub__", 2), Tensor.mul: ("__rmul__", 0)}


def as_operator(operator: LinearOperator | Tensor) -> OperatorBase:
    """A square matrix or operator with checked products, quadratic forms and algebra.

    Operators of this package are returned as they are; the products of others are checked for
    shape, NaN and infinity.

    Args:
        operator: a matrix [P, P], or any `LinearOperator` of that shape.

    Raises:
        ValueError: no shape, dtype or product; not square; empty; not float32 or float64.

    Example:
        >>> A = as_operator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> ((A + 0.5 * A) @ torch.ones(2)).tolist(), A.quadratic_forms(torch.ones(2, 1)).tolist()
        ([1.5, 3.0], [3.0])
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
    return operator if isinstance(operator, OperatorBase) else WrappedOperator(operator)


def _operand(operator: LinearOperator | Tensor) -> OperatorBase:
    return operator if isinstance(operator, OperatorBase) else as_operator(operator)


class OperatorExpression(OperatorBase):
    """Base class of operators that are computed from products with others.

    Operands check their own products; the result is checked again, as it may overflow.
    """

    def __init__(
        self, shape: tuple[int, int], like: OperatorBase, operands: Sequence[OperatorBase]
    ) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        self.operands = tuple(operands)
        self.symmetric = all(operand.symmetric for operand in operands)
        super().__init__()

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.multiply(vectors)
        require_vectors(vectors, self.shape[1], self.dtype, self.device)
        self.products += vectors[0].numel()
        return self._finite(self._combined(vectors, multiply))

    def unchecked(self, vectors: Tensor) -> Tensor:
        self.products += vectors[0].numel()
        return self._combined(vectors, partial(multiply, check=False))

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().quadratic_forms(vectors)
        forms = self._forms(vectors)
        if not checks.all_finite(forms):
            raise not_finite("quadratic forms")
        return forms

    def _combined(self, vectors: Tensor, product: Product) -> Tensor:
        """The product with vectors [P] or [P, K], where `product` multiplies by an operand."""
        raise TypeError(f"{type(self).__name__} has no products")

    def cache_primals(self) -> None:
        for operand in self.operands:
            operand.cache_primals()


Product = Callable[[OperatorBase, Tensor], Tensor]


class SumOperator(OperatorExpression):
    """The sum of c_i A_i over terms (c_i, A_i) of one shape, dtype and device."""

    def __init__(self, terms: Sequence[tuple[float, OperatorBase]]) -> None:
        first = terms[0][1]
        for _, operator in terms[1:]:
            expected, got = (
                f"shape {list(A.shape)}, {A.dtype} on {A.device}" for A in (first, operator)
            )
            if got != expected:
                raise checks.invalid("operator", f"a term of {expected}", got)
        self.terms = tuple(terms)
        super().__init__(first.shape, first, [operator for _, operator in terms])

    def _combined(self, vectors: Tensor, product: Product) -> Tensor:
        (factor, operator), *others = self.terms
        total = factor * product(operator, vectors)
        for factor, operator in others:
            total.add_(product(operator, vectors), alpha=factor)
        return total

    def _forms(self, columns: Tensor) -> Tensor:
        forms = (factor * operator.quadratic_forms(columns) for factor, operator in self.terms)
        return torch.stack(list(forms)).sum(0)

    def _transposed(self) -> OperatorBase:
        return SumOperator([(factor, operator.T) for factor, operator in self.terms])


class ProjectedOperator(OperatorExpression):
    """N A N with N = I - U U^T, for orthonormal columns U [P, r].

    N is applied in two passes, after which what is left along U is rounding of the vector's own
    size (Giraud et al. 2005).
    """

    def __init__(self, operator: OperatorBase, basis: Tensor) -> None:
        self.operator, self.basis = operator, basis
        super().__init__(operator.shape, operator, [operator])

    def _combined(self, vectors: Tensor, product: Product) -> Tensor:
        inside = without(self.basis, vectors).contiguous()
        return without(self.basis, product(self.operator, inside))

    def _forms(self, columns: Tensor) -> Tensor:
        return self.operator.quadratic_forms(without(self.basis, columns).contiguous())

    def _transposed(self) -> OperatorBase:
        return ProjectedOperator(self.operator.T, self.basis)


class WrappedOperator(OperatorExpression):
    """A dense matrix or an operator of another library, with checked products."""

    def __init__(self, wrapped: LinearOperator | Tensor) -> None:
        self.wrapped = wrapped
        self.shape = (int(wrapped.shape[0]), int(wrapped.shape[1]))
        self.dtype, self.device = wrapped.dtype, torch.device(getattr(wrapped, "device", "cpu"))
        super().__init__(self.shape, self, [])
        self.symmetric = bool(getattr(wrapped, "symmetric", False))

    def _combined(self, vectors: Tensor, product: Product) -> Tensor:
        result = self.wrapped @ vectors
        if not isinstance(result, Tensor) or result.shape != vectors.shape:
            raise checks.invalid(
                "operator", f"a product of shape {list(vectors.shape)}", checks.describe(result)
            )
        return result

    def _forms(self, columns: Tensor) -> Tensor:
        quadratic_forms = getattr(self.wrapped, "quadratic_forms", None)
        if quadratic_forms is None:
            return (columns.double() * (self @ columns).double()).sum(0)
        forms = quadratic_forms(columns)
        if not isinstance(forms, Tensor) or forms.shape != columns.shape[1:]:
            expected = f"quadratic forms of shape {list(columns.shape[1:])}"
            raise checks.invalid("operator", expected, checks.describe(forms))
        return forms.double()

    def _transposed(self) -> OperatorBase:
        transpose = getattr(self.wrapped, "T", None)
        return super()._transposed() if transpose is None else as_operator(transpose)


def multiply(operator: OperatorBase, vectors: Tensor, check: bool = True) -> Tensor:
    return operator @ vectors if check else operator.unchecked(vectors)


@contextmanager
def without_shift(operator: OperatorBase) -> Iterator[tuple[OperatorBase, float]]:
    """An operator without its known multiple of the identity, and that multiple.

    Estimators then sample only what is unknown: weight decay adds no variance.
    """
    if not operator.shift:
        yield operator, 0.0
        return
    unshifted = operator.without_shift()
    try:
        yield unshifted, operator.shift
    finally:
        operator.products = unshifted.products
