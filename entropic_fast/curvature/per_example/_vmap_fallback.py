"""Per-example gradients of any model: `torch.func.vmap(grad)`, or one example at a time."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..._torch.full_precision import RefCountedContext, full_precision
from ..._utils import trees
from ..._utils.trees import Tree
from ...objective import Objective
from ...objective.data import Batch

logger = logging.getLogger(__name__)

# Raised by models that vmap cannot trace: control flow that depends on the data, an operation
# without a batching rule (a warning, which `no_slow_loops` makes an error).
UNTRACEABLE = (RuntimeError, NotImplementedError, ValueError, TypeError, UserWarning)


class VmapFallback:
    """Rows of the score matrix of an objective at one point, without layer rules."""

    def __init__(self, obj: Objective, theta: Tensor) -> None:
        self.obj, self.theta = obj, theta
        self._vmap_works = True

    @full_precision()
    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients [n, P] and losses [n] of a batch."""
        # For a single example `Objective.outputs` works around wrong gradients of torch.
        if self._vmap_works and batch.size > 1:
            try:
                return self._by_vmap(batch)
            except UNTRACEABLE as why:
                logger.info("gradients one example at a time, as vmap fails: %s", why)
                self._vmap_works = False
        return self._one_by_one(batch)

    def _by_vmap(self, batch: Batch) -> tuple[Tensor, Tensor]:
        def loss(theta: Tensor, x: Tree, y: Tree) -> Tensor:
            # Not `losses`, which repeats a single example.
            one, target = trees.chosen((x, y), None)
            return self.obj.losses_with(self.obj.split(theta), one, target).sum()

        with no_slow_loops():
            gradients, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(
                self.theta, batch.inputs, batch.targets
            )
        return gradients.detach(), losses.detach()

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, Tensor]:
        n = batch.size
        # One row per example: a list of gradients would be copied once more.
        gradients = self.theta.new_empty(n, len(self.theta))
        losses = []
        for i in range(n):
            leaf = self.theta.detach().requires_grad_()
            one = batch.cut(i, i + 1)
            loss = self.obj.losses(leaf, one.inputs, one.targets)[0]
            gradients[i] = torch.autograd.grad(loss, leaf)[0]
            losses.append(loss.detach())
        return gradients, torch.stack(losses)


@RefCountedContext
@contextlib.contextmanager
def no_slow_loops() -> Iterator[None]:
    """Within it, an operation that vmap would run as a loop raises UserWarning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield
