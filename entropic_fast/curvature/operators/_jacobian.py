"""The Jacobian of a model's outputs in its parameters, by products with it and its transpose."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from ..._torch.full_precision import double_backward_fixes, full_precision
from ..._torch.graph_checks import require_real_outputs, require_twice_differentiable
from ..._utils import checks, trees
from ...objective import Objective, require_objective
from ...ops.random_bits import streams as random
from .._crosscheck import coarsest_dtype
from ..hvp import HVPEngine
from ..hvp._tiles import Tile
from ._algebra import OperatorBase
from ._autograd_check import require_adjoint
from ._base import FastPathOperator, Results


class JacobianOperator(FastPathOperator):
    """The Jacobian J [M, P] of all outputs at a point, never formed.

    M is the number of output numbers over all examples, in the order of the data and, within an
    example, of its flattened outputs. `J @ v` maps changes of the parameters [P] or [P, K] to
    changes of the outputs [M] or [M, K]; `J.T @ u` maps cotangents of the outputs to gradients.
    Both use the captured graph as `HessianOperator` does, for K vectors at once, or fall back to
    autograd (see `method`). With norm="batch" each batch is normalized by its own statistics, which
    are differentiated too.

    Args:
        obj: the objective; its loss does not matter.
        theta: the point; None for the model's own.  # [P]
        memory_budget: bytes for values and tangents; None for a quarter of the free memory, half on
            a GPU. The results, [M, K], come on top.

    Attributes:
        shape: (M, P).
        dtype, device: of vectors and results, the objective's.
        T: the transpose, an operator of shape (P, M).
        method: "graph", or "autograd: " and the reason.

    Raises:
        ValueError: a model in half precision, a point that does not fit; in products, vectors of
            another shape, dtype or device, or not finite, and a product that is not finite.
        RuntimeError: in `J @ v` by autograd, a function marked as once differentiable.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> J = JacobianOperator(Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x)))
    >>> J.shape, (J @ torch.tensor([3.0])).tolist(), (J.T @ torch.tensor([1.0, 1.0])).tolist()
    ((2, 1), [3.0, 6.0], [3.0])
    """

    name, kind = "JacobianOperator", "jacobian"

    def __init__(
        self, obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None
    ) -> None:
        require_objective(obj)
        checks.single_or_double("obj", obj.dtype, self.name)
        obj.require_outputs(self.name)
        self.obj = obj
        with torch.inference_mode(False):
            self.theta = obj.point(theta).clone()
        self.dtype, self.device = obj.dtype, obj.device
        # Output numbers of an example, by the shape of its inputs.
        self._each: dict[Hashable, int] = {}
        count = 0
        for batch in obj.batches():
            like = trees.example_form(batch.inputs)
            if like not in self._each:
                with torch.no_grad():
                    outputs = obj.outputs(self.theta, batch.inputs)
                require_real_outputs(outputs)
                self._each[like] = outputs[0].numel()
            count += batch.size * self._each[like]
        self.shape = (count, obj.num_params)
        self._plan(memory_budget)
        self._is_tested = self._autograd_only  # products by autograd
        super().__init__()
        self._transpose = _Transpose(self)

    # -- products --------------------------------------------------------------------------

    def _product(self, columns: Tensor) -> Tensor:
        rows = columns.T.contiguous()
        products = torch.zeros(len(rows), self.shape[0], dtype=self.dtype, device=self.device)
        for tile, (begin, end) in self._tiles() if len(rows) else ():
            jvp = self._jvp_by_autograd if self._engine is None else self._engine.jvp
            if self._engine is None and not self._is_tested:
                self._require_adjoint(tile)
            products[:, begin:end] = jvp(tile, rows)[:, : end - begin]
        return products.T

    def transposed_product(self, columns: Tensor) -> Tensor:
        """J^T times cotangents [M, K], which may be NaN or infinite, as columns [P, K]."""
        rows = columns.T
        total = torch.zeros(len(rows), self.shape[1], dtype=self.dtype, device=self.device)
        for tile, (begin, end) in self._tiles() if len(rows) else ():
            vjp = self._vjp_by_autograd if self._engine is None else self._engine.vjp
            total += vjp(tile, rows[:, begin:end])
        return total.T

    def _transposed(self) -> OperatorBase:
        return self._transpose

    def _finite(self, result: Tensor) -> Tensor:
        if not checks.all_finite(result):
            raise ValueError(
                f"{self.name}: expected a finite product, got NaN or infinity; look for a function "
                "without a derivative at the point, or overflow"
            )
        return result

    def _tiles(self) -> Iterator[tuple[Tile, tuple[int, int]]]:
        """Tiles of examples, and the range of their outputs among all."""
        if self._engine is not None:
            tiles: Iterator[Tile] = self._engine.tiles()
        else:
            tiles = (Tile(*batch, torch.ones(batch.size)) for batch in self.obj.batches())
        begin = 0
        # The next tile's start tells where a tile ends: its weights would wait for the device.
        for tile, following in pairwise(chain(tiles, [None])):
            assert tile is not None
            last = self.obj.num_examples if following is None else following.start
            end = begin + (last - tile.start) * self._each[trees.example_form(tile.inputs)]
            yield tile, (begin, end)
            begin = end

    def _require_adjoint(self, tile: Tile) -> None:
        """Check <u, J v> = <J^T u, v> for products by autograd."""
        (row, (jvp,)), (back, (vjp,)) = self._by_autograd(tile)
        dtype = coarsest_dtype(self.obj, self.theta, tile.batch.inputs)
        require_adjoint(self.name, jvp, vjp, row, back, dtype)
        self._is_tested = True

    # -- by autograd -----------------------------------------------------------------------

    @full_precision()
    def _jvp_by_autograd(self, tile: Tile, rows: Tensor) -> Tensor:
        """J of a tile times rows [K, P].  # [K, n * outputs]"""
        leaf, outputs = self._outputs(tile)
        require_twice_differentiable(outputs)
        # J^T u is linear in u: the derivative of <J^T u, v> in u is J v at any u.
        u = torch.zeros_like(outputs, requires_grad=True)
        (vjp,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
        products = [torch.autograd.grad(vjp, u, row, retain_graph=True)[0] for row in rows]
        return torch.stack(products).flatten(1)

    @full_precision()
    def _vjp_by_autograd(self, tile: Tile, rows: Tensor) -> Tensor:
        """Rows [K, m * outputs] of the m counted examples times J of a tile.  # [K, P]"""
        leaf, outputs = self._outputs(tile)
        products = [
            torch.autograd.grad(outputs, leaf, row.reshape(outputs.shape), retain_graph=True)[0]
            for row in rows
        ]
        return torch.stack(products)

    def _outputs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        leaf = self.theta.detach().requires_grad_()
        with double_backward_fixes():
            return leaf, self.obj.outputs(leaf, tile.batch.inputs)

    @property
    def _loss(self) -> Objective | None:
        return None  # the Jacobian does not depend on it

    def _by_autograd(self, sample: Tile) -> list[tuple[Tensor, Results]]:
        row = random.normal((1, self.shape[1]), 0, 0, dtype=self.dtype, device=self.device)
        jvp = self._jvp_by_autograd(sample, row)
        shape = tuple(jvp.shape)
        back = random.normal(shape, 0, 1, dtype=self.dtype, device=self.device)
        return [(row, (jvp,)), (back, (self._vjp_by_autograd(sample, back),))]

    def _by_engine(
        self, engine: HVPEngine, sample: Tile, vectors: Sequence[Tensor]
    ) -> list[Results]:
        row, back = vectors
        jvp = engine.jvp(sample, row)[:, : back.shape[1]]
        return [(jvp,), (engine.vjp(sample, back),)]

    def __repr__(self) -> str:
        return f"{self.name}(M={self.shape[0]}, P={self.shape[1]})"


class _Transpose(OperatorBase):
    """The transpose of a Jacobian."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[0])
        self.dtype, self.device = jacobian.dtype, jacobian.device
        super().__init__()

    def _product(self, columns: Tensor) -> Tensor:
        return self.jacobian.transposed_product(columns)

    def _finite(self, result: Tensor) -> Tensor:
        return self.jacobian._finite(result)

    def _transposed(self) -> OperatorBase:
        return self.jacobian

    def __repr__(self) -> str:
        return f"{self.jacobian!r}.T"
