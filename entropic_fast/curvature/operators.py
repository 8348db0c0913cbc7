"""Products with the Hessian and the generalised Gauss-Newton matrix, never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..exact import exact_math
from ..examples import Batch
from ..objective import Objective


class CurvatureOperator:
    """A symmetric matrix [P, P] known by its products; base of the operators.

    Attributes:
        shape: (P, P).
        dtype, device: of the vectors it multiplies, the objective's.
        obj, theta: the objective and the point.
        products: operator-vector products computed so far.
    """

    name = "operator"
    takes_half = False  # whether the model may be in half precision

    def __init__(self, obj: Objective, theta: Tensor | None = None) -> None:
        if not isinstance(obj, Objective):
            raise checks.fail("obj", "an Objective", checks.describe(obj))
        if not self.takes_half:
            checks.full_precision("obj", obj.dtype, self.name)
        self.obj = obj
        self.theta = obj.point(theta).clone()
        self.shape = (obj.num_params, obj.num_params)
        self.dtype, self.device = obj.dtype, obj.device
        self.products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with a vector [P] or the columns of a matrix [P, K].

        Raises:
            ValueError: vectors of another shape, dtype or device, or not finite; a product
                that is not finite.
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        size = self.shape[0]
        if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(vectors) != size:
            raise checks.fail(
                "vectors", f"a tensor of shape [{size}] or [{size}, K]", checks.describe(vectors)
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise checks.fail(
                "vectors",
                f"{self.dtype} on {self.device}",
                f"{vectors.dtype} on {vectors.device}",
                "convert them with vectors.to(operator.device, operator.dtype)",
            )
        checks.finite("vectors", vectors)
        product = self._product(vectors.detach().reshape(size, -1))
        self.products += product.shape[1]
        if not bool(torch.isfinite(product).all()):
            raise ValueError(
                f"{self.name}: expected a finite product, got NaN or infinity at a point of norm "
                f"{float(self.theta.norm()):.4g}, where the loss is finite; look for a function "
                "without a second derivative there, or overflow"
            )
        return product.reshape(vectors.shape).contiguous()

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        """v^T A v for each column v of vectors [P, K], in float64.  # [K]

        Raises:
            ValueError, NonFiniteLossError: as products.
        """
        return (vectors.double() * (self @ vectors).double()).sum(0)

    def _product(self, columns: Tensor) -> Tensor:
        """The product with columns [P, K]."""
        rows = columns.T.contiguous()
        total = torch.zeros_like(rows)
        if len(rows):
            for batch in self.obj.batches():
                self._add_products(batch, rows, total)
        return (total / self.obj.num_examples).T

    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        """Add the products of a batch's summed loss with rows [K, P] to total [K, P]."""
        raise TypeError("use HessianOperator, GGNOperator or FisherOperator")

    def to_scipy(self) -> Any:
        """This operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        dtype = np.float32 if self.dtype == torch.float32 else np.float64

        def product(array: Any) -> Any:
            values = torch.as_tensor(np.array(array), dtype=self.dtype, device=self.device)
            return (self @ values).cpu().numpy()

        return LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.shape[0]}, N={self.obj.num_examples})"


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss at a point, by double backward (Pearlmutter 1994).

    A product with K columns builds one graph a batch, shared by the columns and freed before
    the next batch. Batches weigh the examples they hold. With norm="batch" the normalisation
    statistics are differentiated through. Attention is computed by matrix products, because
    the fused kernels have no second derivative.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]

    Raises:
        ValueError: a model in half precision, a point that does not fit; in products, as
            `CurvatureOperator.__matmul__`.
        RuntimeError: from torch, a function of the model that has no second derivative.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> H = HessianOperator(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> H.shape, (H @ torch.tensor([1.0])).tolist()
    ((1, 1), [5.0])
    """

    name = "HessianOperator"

    @exact_math()
    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        leaf = self.theta.detach().requires_grad_()
        loss = self.obj.finite_losses(leaf, batch).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if not gradient.requires_grad:  # a loss linear in theta
            return
        for i, row in enumerate(rows):
            (product,) = torch.autograd.grad(
                gradient, leaf, row, retain_graph=i + 1 < len(rows), materialize_grads=True
            )
            total[i] += product


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of the mean loss, J^T (d2 loss / d outputs2) J.

    It is the Hessian without the curvature of the model itself (Schraudolph 2002), positive
    semi-definite for a loss convex in the outputs; for cross-entropy with class labels it is
    the Fisher matrix with labels drawn from the model. J v by the derivative of J^T u in u.

    Args:
        obj: the objective; any loss with second derivatives in the outputs.
        theta: the point; None for the model's own.  # [P]

    Raises:
        ValueError, RuntimeError: as `HessianOperator`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> G = GGNOperator(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> (G @ torch.tensor([[1.0, 2.0]])).tolist()
    [[5.0, 10.0]]
    """

    name = "GGNOperator"

    @exact_math()
    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        leaf = self.theta.detach().requires_grad_()
        outputs = self.obj.outputs(leaf, batch.inputs)
        free = outputs.detach().requires_grad_()
        losses = self.obj.output_losses(free, batch.targets)
        if not bool(torch.isfinite(losses.detach()).all()):
            self.obj.finite_losses(self.theta, batch)  # raises, naming the example
        (loss_gradient,) = torch.autograd.grad(losses.sum(), free, create_graph=True)
        if not loss_gradient.requires_grad:  # a loss linear in the outputs
            return
        # J^T u is linear in u, so its derivative in u along v is J v, whatever u is.
        u = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
        for i, row in enumerate(rows):
            more = i + 1 < len(rows)
            (pushed,) = torch.autograd.grad(pulled, u, row, retain_graph=True)
            (weighted,) = torch.autograd.grad(
                loss_gradient, free, pushed, retain_graph=more, materialize_grads=True
            )
            (product,) = torch.autograd.grad(outputs, leaf, weighted, retain_graph=more)
            total[i] += product
