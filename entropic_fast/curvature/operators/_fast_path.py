"""What operators share that go by rules where they can, and by autograd where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._torch.torch_compile import CompileSafe, clean_dispatch_state
from ..._utils import trees
from ...objective import NonFiniteLossError, Objective
from ...objective.losses._functions import origin
from .._crosscheck import coarsest_dtype, fast_paths_are_off, require_agreement
from ..hvp import GraphCaptureError, HVPEngine
from ..hvp._tiles import Tile

logger = logging.getLogger(__name__)


class FastPathOperator(CompileSafe):
    """A matrix of derivatives of a model, by rules for each operation of its graph.

    A model whose graph cannot be captured goes to autograd as a whole. Before the first result
    for a model, both ways are compared on two examples of each shape.

    Attributes:
        method: "graph", or "autograd: " and the reason.
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
        """The loss for which the ways are compared."""
        return origin(self.obj.loss_fn)

    def _fall_back(self, why: str) -> None:
        self._say_why(why)
        self._engine = None

    def _say_why(self, why: str) -> None:
        self._why = why
        logger.info("%s by autograd: %s", self.name, why)

    def _agrees(self, engine: HVPEngine, sample: Tile) -> bool:
        """Compare both ways; whether there is something to compare."""
        pairs = self._by_autograd(sample)
        if not all(bool(torch.isfinite(expected).all()) for _, expected in pairs):
            return False  # the product itself will be refused
        try:
            found = self._by_engine(engine, sample, [vectors for vectors, _ in pairs])
        except (NonFiniteLossError, torch.OutOfMemoryError):
            raise
        except Exception as why:  # an operation that the rules take wrongly
            said = (str(why) or "no message").splitlines()[0]
            raise GraphCaptureError(f"{type(why).__name__}: {said}") from why
        dtype = coarsest_dtype(self.obj, self.theta, sample.inputs)
        for got, (_, expected) in zip(found, pairs, strict=True):
            require_agreement(self.name, got, expected, dtype)
        return True

    def _by_autograd(self, sample: Tile) -> list[tuple[Tensor, Tensor]]:
        """Vectors, and what autograd makes of them for a sample."""
        raise TypeError(f"{type(self).__name__} has no products")

    def _by_engine(
        self, engine: HVPEngine, sample: Tile, vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the engine makes of the same vectors."""
        raise TypeError(f"{type(self).__name__} has no products")

    def __getstate__(self) -> dict[str, Any]:
        # An engine holds graphs and values, which a copy makes for itself.
        state = dict(self.__dict__)
        if state.get("_engine") is not None:
            del state["_engine"]
        return state
