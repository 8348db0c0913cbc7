"""Rows of the score matrix, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..._torch.memory_budget import padded_rows, resolve_budget, too_small
from ..._utils import trees
from ...objective import Objective
from ...objective.data import Batch
from ._engine import PerExampleGradEngine
from .layer_rules import DenseGrad, FactoredGrad

# On a CPU, chunks of 64 examples, or of as many small ones as have this many bytes of activations.
# With 16, Python takes a third of the time (ResNet-20); with 128, a layer's tensors no longer fit
# the caches.
CPU_CHUNK = 64
CPU_ACTIVATIONS = 256 * 2**20
MAX_CHUNK = 1024
# Activations, their gradients, a layer's workspace and freed memory that malloc holds, as measured.
ACTIVATION_COPIES = 3.5
# Rows that torch.func holds: by parameter, flattened, of the chunk before, and once in a layer.
FALLBACK_COPIES = 4


def probe_batch(
    engine: PerExampleGradEngine, form: Callable[[FactoredGrad], FactoredGrad] = lambda grad: grad
) -> dict[str, FactoredGrad]:
    """The first example's gradients, of every parameter that its loss depends on."""
    grads: dict[str, FactoredGrad] = {}
    engine.run(next(engine.obj.batches(1)), lambda name, grad: grads.__setitem__(name, form(grad)))
    return {name: grads[name] for name in engine.obj.parameter_names if name in grads}


def rows_made(grads: Iterable[FactoredGrad]) -> int:
    """Bytes per example that the largest rows among the gradients take while they are made."""
    return max((2 * grad.row_bytes for grad in grads if isinstance(grad, DenseGrad)), default=0)


class PassCost:
    """The memory that a pass over the examples needs, and the chunks that fit.

    `made` is the bytes per example of the rows of one parameter at a time (None for those of the
    largest parameter, in two orders), `fixed` what does not depend on the chunk. Per example,
    `activations` and their gradients, and `rules`, what layer rules need beside the result.
    """

    def __init__(
        self, engine: PerExampleGradEngine, made: int | None = None, fixed: int = 0
    ) -> None:
        obj, self.device = engine.obj, engine.theta.device
        itemsize = max(4, engine.theta.element_size())  # half-precision gradients become float32
        self.fixed = fixed
        sizes = {name: part.numel() for name, part in obj.split(engine.theta).items()}
        saved = engine.surveyed("activations", lambda: activation_bytes(obj, engine.theta))
        self.activations = int(ACTIVATION_COPIES * saved)
        if engine.traceable:
            copies = 4 * sum(sizes[name] for name in engine.batched)
            # A row as it is computed, and in the parameter's order.
            made = 2 * itemsize * max(sizes.values()) if made is None else made
            self.rules = itemsize * copies + made
        else:
            self.rules = itemsize * FALLBACK_COPIES * obj.num_params

    def chunk_within(self, budget: int, result: int, count: int) -> int:
        """Examples per chunk, as even as possible, if `result` bytes are kept per example."""
        example_bytes = self.activations + self.rules + result
        if budget < self.fixed + example_bytes:
            what = "the gradient of one example"
            raise too_small(self.fixed + example_bytes, budget, what, "give more memory")
        most = MAX_CHUNK
        if self.device.type == "cpu":
            most = min(most, max(CPU_CHUNK, CPU_ACTIVATIONS // max(1, self.activations)))
        most = max(1, min(most, (budget - self.fixed) // example_bytes))
        # Even chunks, since small ones are slow: of 16 examples Python takes a third of the time.
        return ceil(count / ceil(count / most))


class ExampleGradients:
    """Per-example gradients of an objective at one point, `chunk` examples at a time.

    Args:
        obj: an objective whose examples do not interact.
        theta: the point [P]; None for the model's own.
        memory_budget: bytes for the gradients and activations of a chunk; None for a quarter
            of the free memory.

    Raises:
        ValueError: examples that interact; a budget below the needs of one example.
    """

    def __init__(
        self, obj: Objective, theta: Tensor | None = None, memory_budget: int | None = None
    ) -> None:
        self.engine = PerExampleGradEngine(obj, theta)
        self.obj, self.theta = obj, self.engine.theta
        self.cost = PassCost(self.engine)
        self.dtype = torch.float64 if self.theta.dtype == torch.float64 else torch.float32
        self.row_bytes = obj.num_params * torch.finfo(self.dtype).bits // 8
        self.example_bytes = self.cost.activations + self.cost.rules + self.row_bytes
        self.chunk = self.chunk_within(resolve_budget(memory_budget, obj.device))

    def chunk_within(self, budget: int) -> int:
        return self.cost.chunk_within(budget, self.row_bytes, self.obj.num_examples)

    def chunks(
        self, max_examples: int | None = None, first: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        """(index of the first example, gradients [n, P]) of consecutive chunks.

        Each chunk is a new tensor, float32 for half-precision models. Chunks that end before
        example `first` are skipped. A loss or a gradient that is not finite raises.
        """
        for batch in self.obj.batches(max_examples, self.chunk):
            if batch.start + batch.size > first:
                yield batch.start, self.rows(batch)

    def local_chunks(self, max_examples: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """`chunks`, of the objective's `local_batches`."""
        for batch in self.obj.local_batches(max_examples, self.chunk):
            yield batch.start, self.rows(batch)

    def rows(self, batch: Batch) -> Tensor:
        """Gradients [n, P] of a batch's examples."""
        rows = padded_rows(self.theta, batch.size, self.obj.num_params, dtype=self.dtype)
        # Parameters that no loss depends on are not passed on: their columns stay 0.
        rows.zero_()
        self.engine.write(batch, rows)
        # The largest entry of each row, without the copy that isfinite makes of its argument.
        require_finite(
            torch.linalg.vector_norm(rows, ord=float("inf"), dim=1), batch.start, self.theta
        )
        return rows


def require_finite(sizes: Tensor, start: int, theta: Tensor) -> None:
    """Reject gradients whose norm in `sizes` [n], from example `start` on, is not finite."""
    finite = torch.isfinite(sizes)
    if not bool(finite.all()):
        bad = start + int((~finite).nonzero()[0])
        raise ValueError(
            f"gradient: expected finite values, got NaN or infinity for example {bad} at a "
            f"point of norm {float(theta.norm()):.4g}, where its loss is finite; look "
            "for a function without a derivative there (a square root at 0, say)"
        )


def activation_bytes(obj: Objective, theta: Tensor) -> int:
    """Bytes that autograd saves for the backward pass of the loss of one example, as measured."""
    batch = next(obj.batches(1))
    leaf = theta.detach().requires_grad_()
    # Storages saved for backward, each once, without what all examples share.
    shared = [leaf, *trees.leaves(batch[1:]), *obj.buffers.values()]
    shared_storages = {tensor.untyped_storage().data_ptr() for tensor in shared}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        if tensor._is_zerotensor():  # of forward mode: it has no storage
            return tensor.detach()
        storage = tensor.untyped_storage()
        try:
            address = storage.data_ptr()
        except RuntimeError:  # what a transform within the model leaves has none
            saved[storage._cdata] = tensor.nbytes
        else:
            if address not in shared_storages:
                saved[address] = storage.nbytes()
        return tensor.detach()  # a node that held its own result would never be freed

    def loss() -> Tensor:
        return obj.losses(leaf, batch.inputs, batch.targets).sum()

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss()
    except RuntimeError:  # torch.func within the model takes no such hooks
        saved.clear()
        for tensor in _saved_in_graph(loss().grad_fn):
            note(tensor)
    return sum(saved.values()) + trees.num_bytes(batch.inputs)


def _saved_in_graph(root: Any) -> Iterator[Tensor]:
    """The tensors that the nodes of an autograd graph hold, those of python functions too."""
    stack, seen = [root], {root, None}
    while stack:
        node = stack.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        for value in [getattr(node, name) for name in names]:
            several = value if isinstance(value, tuple | list) else (value,)
            yield from (t for t in several if isinstance(t, Tensor))
        yield from (t for t in getattr(node, "saved_tensors", ()) if t is not None)
        following = {n for n, _ in node.next_functions} - seen
        seen |= following
        stack += following
