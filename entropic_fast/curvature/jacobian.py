"""The Jacobian of a model's outputs in its parameters, by products with it and its transpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import checks, random
from ..exact import TwiceDifferentiable, exact_math
from ..model_checks import require_twice_differentiable
from ..objective import Objective
from .agreement import AGREEMENT, DisagreementError, rules_are_off
from .compiled import Compilable, undisturbed
from .jets import JetEngine, NotCapturedError
from .jets.engine import Tile
from .memory import resolve_budget

logger = logging.getLogger(__name__)

# Differences of so many roundings of 1 are none, however small the product.
_ROUNDING = 1e3


class JacobianOperator(Compilable):
    """The Jacobian J [M, P] of all outputs at a point, never formed.

    M is the number of output numbers over all examples, in the order of the data and, within an
    example, of its flattened outputs. `J @ v` maps changes of the parameters [P] or [P, K] to
    changes of the outputs [M] or [M, K]; `J.T @ u` maps cotangents of the outputs [M] or [M, K]
    to gradients [P] or [P, K]. Both go by the rules of `HessianOperator`, K at once, with values
    at the point shared; a model whose graph cannot be captured goes to autograd (see `way`).
    With norm="batch" each batch is normalised by its own statistics, differentiated through.

    Args:
        obj: the objective, of which the loss does not matter.
        theta: the point; None for the model's own.  # [P]
        memory_budget: bytes for values and tangents; None for a quarter of the free memory. The
            results, [M, K], come on top.

    Attributes:
        shape: (M, P).
        dtype, device: of vectors and results, the objective's.
        T: the transpose, an operator of shape (P, M).
        way: "rules", or "autograd" with the reason.

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

    symmetric = False
    name = "JacobianOperator"

    def __init__(
        self, obj: Objective, theta: Tensor | None = None, *, memory_budget: int | None = None
    ) -> None:
        if not isinstance(obj, Objective):
            raise checks.fail("obj", "an Objective", checks.describe(obj))
        checks.full_precision("obj", obj.dtype, self.name)
        self.obj = obj
        with torch.inference_mode(False):
            self.theta = obj.point(theta).clone()
        self.dtype, self.device = obj.dtype, obj.device
        # Output numbers of an example, by the shape of its inputs.
        self._each: dict[torch.Size, int] = {}
        count = 0
        for batch in obj.batches():
            like = batch.inputs.shape[1:]
            if like not in self._each:
                with torch.no_grad():
                    self._each[like] = obj.outputs(self.theta, batch.inputs)[0].numel()
            count += len(batch.inputs) * self._each[like]
        self.shape = (count, obj.num_params)
        self._rules_off = rules_are_off()
        self._budget = resolve_budget(memory_budget, obj.device)
        super().__init__()
        self.T = _Transpose(self)

    @property
    def way(self) -> str:
        """How products are taken: "rules", or "autograd" with the reason."""
        with undisturbed():
            return "rules" if self._engine is not None else f"autograd, as {self._why}"

    @cached_property
    def _engine(self) -> JetEngine | None:
        try:
            if self._rules_off:
                raise NotCapturedError("rules are turned off")
            engine = JetEngine(self.obj, self.theta, self._budget)
            self._check(engine)
        except NotCapturedError as why:
            self._why = str(why)
            logger.info("%s by autograd, as %s", self.name, why)
            return None
        return engine

    # -- products --------------------------------------------------------------------------

    def _multiply(self, vectors: Tensor) -> Tensor:
        columns = require_vectors(vectors, self.shape[1], self.dtype, self.device)
        rows = columns.reshape(self.shape[1], -1).T.contiguous()
        found = torch.zeros(len(rows), self.shape[0], dtype=self.dtype, device=self.device)
        for tile, (begin, end) in self._tiles() if len(rows) else ():
            found[:, begin:end] = self._push(tile, rows)[:, : end - begin]
        product = require_finite_product(self.name, found).T
        return product.reshape(self.shape[0], *vectors.shape[1:]).contiguous()

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        columns = require_vectors(vectors, self.shape[0], self.dtype, self.device)
        rows = columns.reshape(self.shape[0], -1).T
        total = torch.zeros(len(rows), self.shape[1], dtype=self.dtype, device=self.device)
        for tile, (begin, end) in self._tiles() if len(rows) else ():
            total += self._pull(tile, rows[:, begin:end])
        product = require_finite_product(self.name, total).T
        return product.reshape(self.shape[1], *vectors.shape[1:]).contiguous()

    def _tiles(self) -> Iterator[tuple[Tile, tuple[int, int]]]:
        """Tiles of examples, and their outputs' places among all."""
        if self._engine is not None:
            tiles: Iterator[Tile] = self._engine.tiles()
        else:
            tiles = (Tile(*batch, torch.ones(len(batch.inputs))) for batch in self.obj.batches())
        begin = 0
        for tile in tiles:
            end = begin + int(tile.weights.sum()) * self._each[tile.inputs.shape[1:]]
            yield tile, (begin, end)
            begin = end

    def _push(self, tile: Tile, rows: Tensor) -> Tensor:
        """J of a tile times rows [K, P].  # [K, n * outputs]"""
        if self._engine is None:
            return self._push_by_autograd(tile, rows)
        return self._engine.pushed(tile, rows)

    def _pull(self, tile: Tile, rows: Tensor) -> Tensor:
        """Rows [K, m * outputs] of the m counted examples times J of a tile.  # [K, P]"""
        if self._engine is None:
            return self._pull_by_autograd(tile, rows)
        return self._engine.pulled(tile, rows)

    # -- by autograd -----------------------------------------------------------------------

    @exact_math()
    def _push_by_autograd(self, tile: Tile, rows: Tensor) -> Tensor:
        leaf, outputs = self._outputs(tile)
        require_twice_differentiable(outputs)
        # J^T u is linear in u, so its derivative in u along v is J v, whatever u is.
        u = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, leaf, u, create_graph=True)
        found = [torch.autograd.grad(pulled, u, row, retain_graph=True)[0] for row in rows]
        return torch.stack(found).flatten(1)

    @exact_math()
    def _pull_by_autograd(self, tile: Tile, rows: Tensor) -> Tensor:
        leaf, outputs = self._outputs(tile)
        found = [
            torch.autograd.grad(outputs, leaf, row.reshape(outputs.shape), retain_graph=True)[0]
            for row in rows
        ]
        return torch.stack(found)

    def _outputs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        leaf = self.theta.detach().requires_grad_()
        with TwiceDifferentiable():
            return leaf, self.obj.outputs(leaf, tile.batch.inputs)

    def _check(self, engine: JetEngine) -> None:
        """Compare both ways on the first examples, once for a model."""
        sample = engine.sample()
        done = engine.program(sample).checked.setdefault(None, set())
        if "jacobian" in done:
            return
        row = random.normal((1, self.shape[1]), 0, 0, dtype=self.dtype, device=self.device)
        expected = self._push_by_autograd(sample, row)
        shape = tuple(expected.shape)
        back = random.normal(shape, 0, 1, dtype=self.dtype, device=self.device)
        expected_back = self._pull_by_autograd(sample, back)
        if not bool(torch.isfinite(expected).all() and torch.isfinite(expected_back).all()):
            return  # nothing to compare with; the product itself will be refused
        try:
            got = engine.pushed(sample, row)[:, : expected.shape[1]]
            got_back = engine.pulled(sample, back)
        except torch.OutOfMemoryError:
            raise
        except Exception as why:  # an operation that the rules take wrongly
            said = (str(why) or "no message").splitlines()[0]
            raise NotCapturedError(f"{type(why).__name__}: {said}") from why
        for one, other in ((got, expected), (got_back, expected_back)):
            scale, gap = float(other.double().norm()), float((one - other).double().norm())
            slack = _ROUNDING * torch.finfo(self.dtype).eps
            if not gap <= AGREEMENT[self.dtype][0] * scale + slack:
                raise DisagreementError(
                    f"{self.name}: a product of norm {scale:.3g} differs by {gap:.3g} between the "
                    "rules and autograd; this is a bug in entropic_fast: please report the model; "
                    "meanwhile, build the operator within "
                    "`with entropic_fast.curvature.without_rules():`"
                )
        done.add("jacobian")

    def to_scipy(self) -> Any:
        """This operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def by(operator: Compilable) -> Any:
            def product(array: Any) -> Any:
                values = torch.as_tensor(np.array(array), dtype=self.dtype, device=self.device)
                return operator.multiply(values).cpu().numpy()

            return product

        return LinearOperator(
            self.shape,
            matvec=by(self),
            matmat=by(self),
            rmatvec=by(self.T),
            rmatmat=by(self.T),
            dtype=np.float32 if self.dtype == torch.float32 else np.float64,
        )

    def __repr__(self) -> str:
        return f"{self.name}(M={self.shape[0]}, P={self.shape[1]})"


class _Transpose(Compilable):
    """The transpose of a Jacobian."""

    symmetric = False

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.T = jacobian
        self.shape = (jacobian.shape[1], jacobian.shape[0])
        self.dtype, self.device = jacobian.dtype, jacobian.device
        super().__init__()

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self.T._multiply_transposed(vectors)

    def __repr__(self) -> str:
        return f"{self.T!r}.T"


def require_vectors(vectors: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Vectors [size] or [size, K] that an operator can multiply."""
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(vectors) != size:
        raise checks.fail(
            "vectors", f"a tensor of shape [{size}] or [{size}, K]", checks.describe(vectors)
        )
    if vectors.dtype != dtype or vectors.device != device:
        raise checks.fail(
            "vectors",
            f"{dtype} on {device}",
            f"{vectors.dtype} on {vectors.device}",
            "convert them with vectors.to(operator.device, operator.dtype)",
        )
    found: Tensor = checks.finite("vectors", vectors).detach()
    return found.clone() if found.is_inference() else found


def require_finite_product(name: str, product: Tensor) -> Tensor:
    if not bool(torch.isfinite(product).all()):
        raise ValueError(
            f"{name}: expected a finite product, got NaN or infinity; look for a function without "
            "a derivative at the point, or overflow"
        )
    return product
