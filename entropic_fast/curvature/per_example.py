"""Gradients of single examples' losses, chunk by chunk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from ..exact import exact_math
from ..examples import Batch
from ..objective import Objective
from .memory import activation_bytes, resolve_budget, too_small

logger = logging.getLogger(__name__)

# More examples at once are no faster: on a CPU their activations leave the caches.
MAX_CHUNK = {"cpu": 32}
MAX_CHUNK_ELSEWHERE = 256
# A gradient is held by parameter, flattened, as the chunk before, and once more by a layer
# that computes it; activations with their gradients and a layer's workspace. Measured peaks
# are 0.9 to 1.05 of the estimate for wide linear layers, less for convolutions.
GRADIENT_COPIES = 4
ACTIVATION_COPIES = 3


class ExampleGradients:
    """Per-example gradients of an objective at one point, `chunk` examples at a time.

    `torch.func.vmap(grad)` where it handles the model; else one example after another, with a
    note in the log (the numbers are the same, the time is not).

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        memory_budget: bytes for the gradients and activations of a chunk; None for a quarter
            of the free memory.

    Attributes:
        chunk: most examples taken at once.
        example_bytes: memory estimated for each example of a chunk.

    Raises:
        ValueError: examples that influence one another; a budget under one example's needs.
    """

    def __init__(
        self, obj: Objective, theta: Tensor | None = None, memory_budget: int | None = None
    ) -> None:
        obj.require_single_examples()
        self.obj, self.theta = obj, obj.point(theta).detach()
        itemsize = self.theta.element_size()
        self.example_bytes = (
            GRADIENT_COPIES * obj.num_params * itemsize
            + ACTIVATION_COPIES * activation_bytes(obj, self.theta)
        )
        self.chunk = self.chunk_within(resolve_budget(memory_budget, obj.device))
        self._vmap_works = True

    def chunk_within(self, budget: int) -> int:
        """The number of examples to take at once under a budget in bytes."""
        if budget < self.example_bytes:
            raise too_small(
                self.example_bytes, budget, "the gradient of one example", "give more memory"
            )
        most = MAX_CHUNK.get(self.theta.device.type, MAX_CHUNK_ELSEWHERE)
        return min(most, budget // self.example_bytes)

    def chunks(
        self, max_examples: int | None = None, first: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        """(index of the first example, gradients [n, P]) of consecutive chunks.

        Args:
            max_examples: only the first so many examples; None for all.
            first: skip chunks that end before this example.

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
            ValueError: a gradient that is NaN or infinite though the loss is finite.
        """
        for batch in self.obj.batches(max_examples, self.chunk):
            if batch.start + len(batch.inputs) > first:
                yield batch.start, self._gradients(batch)

    @exact_math()
    def _gradients(self, batch: Batch) -> Tensor:
        if self._vmap_works:
            try:
                gradients, losses = self._by_vmap(batch)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, UserWarning) as why:
                logger.info("gradients one example at a time, as vmap fails: %s", why)
                self._vmap_works = False
        if not self._vmap_works:
            gradients, losses = self._one_by_one(batch)
        if not bool(torch.isfinite(losses).all()):
            self.obj.finite_losses(self.theta, batch)  # raises, naming the example
        # The largest entry of each row, without the copy that isfinite makes of its argument.
        finite = torch.isfinite(torch.linalg.vector_norm(gradients, ord=float("inf"), dim=1))
        if not bool(finite.all()):
            bad = batch.start + int((~finite).nonzero()[0])
            raise ValueError(
                f"gradient: expected finite values, got NaN or infinity for example {bad} at a "
                f"point of norm {float(self.theta.norm()):.4g}, where its loss is finite; look "
                "for a function without a derivative there (a square root at 0, say)"
            )
        return gradients

    def _by_vmap(self, batch: Batch) -> tuple[Tensor, Tensor]:
        def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return self.obj.losses(theta, x[None], y[None]).sum()

        with warnings.catch_warnings():
            # An operator without a batching rule: a loop inside, so the plain loop is as good.
            warnings.filterwarnings("error", message="There is a performance drop")
            gradients, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(
                self.theta, batch.inputs, batch.targets
            )
        return gradients.detach(), losses.detach()

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, Tensor]:
        n = len(batch.inputs)
        gradients = self.theta.new_empty(n, len(self.theta))
        losses = self.theta.new_empty(n)
        for i in range(n):
            leaf = self.theta.detach().requires_grad_()
            one = slice(i, i + 1)
            loss = self.obj.losses(leaf, batch.inputs[one], batch.targets[one]).sum()
            gradients[i] = torch.autograd.grad(loss, leaf)[0]
            losses[i] = loss.detach()
        return gradients, losses
