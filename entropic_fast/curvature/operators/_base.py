"""Base classes of curvature operators: the point of an objective, and the fast path."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks, trees
from ...objective import NonFiniteLossError, Objective, require_objective
from ...objective.losses import origin
from .._crosscheck import coarsest_dtype, fast_paths_are_off, require_agreement
from ..hvp import GraphCaptureError, HVPEngine
from ..hvp._tiles import Tile
from ._algebra import OperatorBase
from ._linear_operator import NonFiniteProductError

logger = logging.getLogger(__name__)
Results = tuple[Tensor, ...]  # of one block of vectors


class CurvatureOperator(OperatorBase):
    """Base class of Hessian, GGN and Fisher: a symmetric matrix [P, P] of an objective."""

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
            point = obj.point(theta)
            # The objective's own point never changes; one made in inference mode has no gradient.
            own = theta is None and not point.is_inference()
            self.theta = point if own else point.clone()
        self.shape = (obj.num_params, obj.num_params)
        self.dtype, self.device = obj.dtype, obj.device
        super().__init__()

    def _finite(self, result: Tensor) -> Tensor:
        if not checks.all_finite(result):
            raise NonFiniteProductError(
                f"{self.name}: expected a finite product, got NaN or infinity at a point of norm "
                f"{float(self.theta.norm()):.4g}, where the loss is finite; look for a function "
                "without a second derivative there, or overflow"
            )
        return result

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.shape[0]}, N={self.obj.num_examples})"


class FastPathOperator(OperatorBase):
    """Base class of operators with a captured-graph fast path and an autograd fallback.

    Before the first result for a model, both are compared on two examples of each input shape.
    """

    obj: Objective
    theta: Tensor
    name = kind = ""

    def _plan(self, memory_budget: int | None) -> None:
        self._autograd_only = fast_paths_are_off()
        self._budget = resolve_budget(memory_budget, self.obj.device)

    @property
    def method(self) -> str:
        """How products are computed: "graph", or "autograd: " and the reason."""
        with clean_dispatch_state():
            return "graph" if self._engine is not None else f"autograd: {self._why}"

    @cached_property
    def _engine(self) -> HVPEngine | None:
        try:
            if self._autograd_only:
                raise GraphCaptureError("switched off by autograd_only")
            engine = HVPEngine(self.obj, self.theta, self._budget)
            for sample in engine.samples():
                checked = engine.interpreter(sample).checked
                kind = self.kind, trees.form(sample.targets)
                if (kind, self._loss) not in checked and self._agrees(engine, sample):
                    checked.add(kind, self._loss)
        except GraphCaptureError as why:
            self._say_why(str(why))
            return None
        return engine

    @property
    def _loss(self) -> Any:
        """The loss for which both methods are compared."""
        return origin(self.obj.loss_fn)

    def _fall_back(self, why: str) -> None:
        self._say_why(why)
        self._engine = None

    def _say_why(self, why: str) -> None:
        self._why = why
        logger.info("%s by autograd: %s", self.name, why)

    def _agrees(self, engine: HVPEngine, sample: Tile) -> bool:
        """Compare both methods; False if there is nothing finite to compare."""
        pairs = self._by_autograd(sample)
        if not all(checks.all_finite(*expected) for _, expected in pairs):
            return False  # the product itself raises the error
        try:
            results = self._by_engine(engine, sample, [vectors for vectors, _ in pairs])
        except (NonFiniteLossError, torch.OutOfMemoryError):
            raise
        except Exception as why:  # an operation for which a JVP rule fails
            said = (str(why) or "no message").splitlines()[0]
            raise GraphCaptureError(f"{type(why).__name__}: {said}") from why
        if not all(checks.all_finite(*got) for got in results):
            raise GraphCaptureError(
                "the captured graph gives NaN or infinity where autograd does not"
            )
        dtype = coarsest_dtype(self.obj, self.theta, sample.inputs)
        for got, (_, expected) in zip(results, pairs, strict=True):
            require_agreement(self.name, got, expected, dtype)
        return True

    def _by_autograd(self, sample: Tile) -> list[tuple[Tensor, Results]]:
        """Pairs of vectors and what autograd gives for them and a sample."""
        raise TypeError(f"{type(self).__name__} has no products")

    def _by_engine(
        self, engine: HVPEngine, sample: Tile, vectors: Sequence[Tensor]
    ) -> list[Results]:
        """The same of each of the vectors by the engine."""
        raise TypeError(f"{type(self).__name__} has no products")

    def __getstate__(self) -> dict[str, Any]:
        # An engine holds graphs and values, which a copy computes for itself.
        state = dict(self.__dict__)
        if state.get("_engine") is not None:
            del state["_engine"]
        return state
