"""The Hessian and the generalized Gauss-Newton matrix by their products, never formed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..._torch.full_precision import double_backward_fixes, full_precision
from ..._torch.graph_checks import require_twice_differentiable
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ...objective import Objective
from ...objective.data import Batch
from ...ops.random_bits import streams as random
from .._crosscheck import FastPathMismatchError
from ..hvp import HVPEngine
from ..hvp._tiles import Tile
from ._algebra import OperatorBase, SumOperator
from ._autograd_check import require_right_loss, require_right_products
from ._base import CurvatureOperator, FastPathOperator, Results
from ._difference_check import are_worthwhile, ggn_product, hessian_product
from ._linear_operator import LinearOperator, finite_together

logger = logging.getLogger(__name__)


class SecondOrderOperator(FastPathOperator, CurvatureOperator):
    """A matrix of second derivatives of the mean loss; base class of Hessian and Gauss-Newton.

    A third of the memory budget may hold values that the next product needs again. The minimum is
    one example and one direction at a time, independent of the budget.
    """

    _by_differences = False  # how the products of a sample are computed that the graph's should be

    def __init__(
        self, obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None
    ) -> None:
        CurvatureOperator.__init__(self, obj, theta)
        self._plan(memory_budget)
        self._is_tested = self._autograd_only  # products by autograd

    def _product(self, columns: Tensor) -> Tensor:
        rows = columns.T.contiguous()
        if self._engine is None:
            return self._product_by_autograd(rows)
        products = partial(self._engine.products, rows, self.kind)
        what = (f"{self.kind} products", self.theta, rows, self.obj.fingerprint)
        return self._mean(self.obj.communicator.all_reduce(products, *what), rows).T

    def _product_otherwise(self, columns: Tensor, product: Tensor) -> Tensor:
        if self._engine is None:
            return product
        product = self._product_by_autograd(columns.T.contiguous())
        if checks.all_finite(product):
            self._fall_back("the captured graph gives NaN or infinity where autograd does not")
        return product

    def _product_by_autograd(self, rows: Tensor) -> Tensor:
        if not self._is_tested:
            require_right_products(self)
            self._is_tested = True

        def by_autograd() -> Tensor:
            local_sum = torch.zeros_like(rows)
            for batch in self.obj.local_batches() if len(rows) else ():
                self._add_products(batch, rows, local_sum)
            return local_sum

        total = self.obj.all_reduce(by_autograd, f"{self.kind} by autograd", self.theta, rows)
        return self._mean(total, rows).T

    def _mean(self, total: Tensor, rows: Tensor) -> Tensor:
        """Products with rows [K, P] from their sum over examples, with weight decay.  # [K, P]"""
        mean = total.div_(self.obj.num_examples)
        return mean.add_(rows, alpha=self.obj.weight_decay) if self.obj.weight_decay else mean

    @property
    def shift(self) -> float:
        """The multiple of the identity in this matrix: the objective's weight decay."""
        return self.obj.weight_decay

    def without_shift(self) -> SecondOrderOperator:
        """This matrix without weight decay, sharing its values at the point."""
        with clean_dispatch_state():
            engine = self._engine
        unshifted = copy.copy(self)
        if engine is not None:
            unshifted._engine = engine
        unshifted.obj = self.obj.data_term()
        return unshifted

    @property
    def graphs(self) -> str:
        """On a GPU "captured" once CUDA graphs have run, or why they have not; else ""."""
        engine = self.__dict__.get("_engine")
        if engine is None:
            return ""
        return "captured" if engine.graphs.captures else engine.graphs.note

    def cache_primals(self) -> None:
        """Cache values at the point from the next product on, not only from the second."""
        with clean_dispatch_state():
            if self._engine is not None:
                self._engine.cache_primals(self.kind)

    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        """Add the products of a batch's summed loss with rows [K, P] to total, by autograd."""
        raise TypeError("use HessianOperator or GGNOperator")

    def _agrees(self, engine: HVPEngine, sample: Tile) -> bool:
        require_right_loss(self.obj, self.theta, self.name)  # which both methods leave to autograd
        if are_worthwhile(self.obj, engine.interpreter(sample)):
            try:
                self._by_differences = True
                return super()._agrees(engine, sample)
            except FastPathMismatchError:  # or a kink between the points: autograd has none
                logger.info("%s: not what differences give, compared with autograd", self.name)
            finally:
                self._by_differences = False
        return super()._agrees(engine, sample)

    def _by_autograd(self, sample: Tile) -> list[tuple[Tensor, Results]]:
        row = random.rademacher((1, len(self.theta)), 0, 0, dtype=self.dtype, device=self.device)
        if self._by_differences:
            multiply = ggn_product if self.kind == "ggn" else hessian_product
            product = multiply(self.obj, self.theta, sample.batch, row[0])
            return [(row, (product.to(row.dtype)[None],))]
        expected = torch.zeros_like(row)
        self._add_products(sample.batch, row, expected)
        return [(row, (expected,))]

    def _by_engine(
        self, engine: HVPEngine, sample: Tile, vectors: Sequence[Tensor]
    ) -> list[Results]:
        return [(engine.products(vectors[0], self.kind, sample),)]


class HessianOperator(SecondOrderOperator):
    """The Hessian of the mean loss at a point.

    A product with K columns (Pearlmutter 1994) carries K tangents at once through the captured
    graph of the network and of its backward pass, tile by tile; values at the point are cached for
    later products where memory allows. Quadratic forms take one pass of tangents, about half the
    work of a product (docs/design/hvp.md). With norm="batch" the normalization statistics are
    differentiated too. A model whose graph cannot be captured falls back to double backward.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        memory_budget: bytes for values and tangents; None for a quarter of the free memory, half on
            a GPU.

    Attributes:
        method: "graph", or "autograd: " and the reason.

    Raises:
        ValueError: a model in half precision, a point that does not fit; in products, vectors of
            another shape, dtype or device, or not finite, and a product that is not finite.
        RuntimeError: from torch, a function of the model that has no second derivative.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> H = HessianOperator(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> H.shape, (H @ torch.tensor([1.0])).tolist()
    ((1, 1), [5.0])
    """

    name, kind = "HessianOperator", "hessian"

    def _by_autograd(self, sample: Tile) -> list[tuple[Tensor, Results]]:
        ((row, (expected,)),) = super()._by_autograd(sample)
        return [(row, (expected, _scaled_form(row, expected)))]

    def _by_engine(
        self, engine: HVPEngine, sample: Tile, vectors: Sequence[Tensor]
    ) -> list[Results]:
        ((product,),) = super()._by_engine(engine, sample, vectors)
        row, form = vectors[0], engine.quadratic_forms(vectors[0], sample)
        if not bool(torch.isfinite(form).all()):  # `_forms` then multiplies
            return [(product, _scaled_form(row, product))]
        return [(product, form / row.shape[1] ** 0.5)]

    def _forms(self, columns: Tensor) -> Tensor:
        if self._engine is None:
            return super()._forms(columns)
        return self._engine_forms(self._engine, columns)

    def _forms_otherwise(self, columns: Tensor, forms: Tensor) -> Tensor:
        return forms if self._engine is None else super()._forms_otherwise(columns, forms)

    def _network_forms(self, vectors: Tensor) -> Tensor | None:
        """v^T (H - G) v [K] by the graph alone, or None if that gives no finite numbers."""
        columns = self._columns(vectors)
        if self._engine is None:
            return None
        forms = self._engine_forms(self._engine, columns, network_alone=True)
        if finite_together(forms, columns):
            return forms
        checks.finite("vectors", vectors)
        return None

    def _engine_forms(
        self, engine: HVPEngine, columns: Tensor, *, network_alone: bool = False
    ) -> Tensor:
        """Quadratic forms by the graph, in float64 [K], which may be NaN or infinite."""
        rows = columns.T.contiguous()
        forms = self.obj.all_reduce(
            lambda: engine.quadratic_forms(rows, network_alone=network_alone),
            f"forms, network_alone={network_alone}",
            self.theta,
            rows,
        )
        forms = forms / self.obj.num_examples
        if self.obj.weight_decay and not network_alone:
            forms += self.obj.weight_decay * rows.double().square().sum(1)
        return forms

    def __sub__(self, other: LinearOperator | Tensor) -> OperatorBase:
        """The difference; from a Gauss-Newton matrix at the same point, `NetworkCurvature`."""
        if not isinstance(other, GGNOperator) or other.obj is not self.obj:
            return super().__sub__(other)
        same_point = torch.equal(self.theta, other.theta)
        return NetworkCurvature(self, other) if same_point else super().__sub__(other)

    @full_precision()
    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        leaf = self.theta.detach().requires_grad_()
        with double_backward_fixes():
            loss = self.obj.finite_losses(leaf, batch).sum()
        require_twice_differentiable(loss)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if not gradient.requires_grad:  # a loss linear in theta
            return
        for i, row in enumerate(rows):
            (product,) = torch.autograd.grad(
                gradient, leaf, row, retain_graph=i + 1 < len(rows), materialize_grads=True
            )
            total[i] += product


def _scaled_form(signs: Tensor, product: Tensor) -> Tensor:
    """v^T H v over the norm of v, which is at most as large as the product.  # [1]"""
    return torch.dot(signs[0], product[0])[None].div(signs.shape[1] ** 0.5)


class GGNOperator(SecondOrderOperator):
    """The generalized Gauss-Newton matrix of the mean loss, J^T (d2 loss / d outputs2) J.

    It is the Hessian without the curvature of the network itself (Schraudolph 2002), positive
    semi-definite for a loss convex in the outputs; for cross-entropy with class labels it is
    the Fisher matrix with labels drawn from the model. Weight decay c of the objective adds c I.

    Args:
        obj, theta, memory_budget: as for `HessianOperator`.

    Raises:
        ValueError, RuntimeError: as `HessianOperator`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> G = GGNOperator(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> (G @ torch.tensor([[1.0, 2.0]])).tolist()
    [[5.0, 10.0]]
    """

    name, kind = "GGNOperator", "ggn"
    needs_outputs = True

    @full_precision()
    def _add_products(self, batch: Batch, rows: Tensor, total: Tensor) -> None:
        leaf = self.theta.detach().requires_grad_()
        with double_backward_fixes():
            outputs = self.obj.outputs(leaf, batch.inputs)
        require_twice_differentiable(outputs)
        free = outputs.detach().requires_grad_()
        losses = self.obj.output_losses(free, batch.targets)
        if not bool(torch.isfinite(losses.detach()).all()):
            self.obj.finite_losses(self.theta, batch)  # raises, naming the example
        require_twice_differentiable(losses)
        (loss_gradient,) = torch.autograd.grad(losses.sum(), free, create_graph=True)
        if not loss_gradient.requires_grad:  # a loss linear in the outputs
            return
        # J^T u is linear in u: the derivative of <J^T u, v> in u is J v at any u.
        u = torch.zeros_like(outputs, requires_grad=True)
        (vjp,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
        for i, row in enumerate(rows):
            more = i + 1 < len(rows)
            (jvp,) = torch.autograd.grad(vjp, u, row, retain_graph=True)
            (weighted,) = torch.autograd.grad(
                loss_gradient, free, jvp, retain_graph=more, materialize_grads=True
            )
            (product,) = torch.autograd.grad(outputs, leaf, weighted, retain_graph=more)
            total[i] += product


class NetworkCurvature(SumOperator):
    """H - G at one point of an objective: the curvature of the network itself.

    It is weighted by the loss's gradient in the outputs. Quadratic forms cost one of H where the
    model's graph is captured; products are those of H and of G.
    """

    def __init__(self, hessian: HessianOperator, gauss_newton: GGNOperator) -> None:
        super().__init__([(1.0, hessian), (-1.0, gauss_newton)])
        self.hessian = hessian

    def _forms(self, columns: Tensor) -> Tensor:
        with clean_dispatch_state():
            forms = self.hessian._network_forms(columns)
        return super()._forms(columns) if forms is None else forms
