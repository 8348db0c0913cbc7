"""Products and quadratic forms of an objective's curvature, a tile of examples at a time."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from math import ceil, prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...exact import exact_math
from ...objective import Objective
from .capture import NotCapturedError, capture
from .loss import LossAt
from .program import Program, Values

logger = logging.getLogger(__name__)

# Directions taken at once, of those asked for.
WIDTH = 8
# Bytes that the tangents of the widest layer may take on a CPU: over 32 MiB the allocator returns
# every tensor to the system, and its pages are cleared anew at each use.
CPU_TILE = 16 * 2**20
CPU_TILE_EXAMPLES = 1024
GPU_TILE_EXAMPLES = 512
# Programs kept for a model: inputs of as many shapes.
PROGRAMS = 8


class Tile(NamedTuple):
    """Examples, filled up to the size of the others; those added weigh 0."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor  # [n]


class JetEngine:
    """Curvature of the summed loss at one point.

    Args:
        obj: the objective.
        theta: the point.  # [P]
        budget: bytes to stay under.

    Raises:
        NotCapturedError: a model whose graph does not say all there is to its derivatives.
    """

    def __init__(self, obj: Objective, theta: Tensor, budget: int) -> None:
        self.obj, self.theta, self.budget = obj, theta, budget
        self._parts = [part.detach() for part in obj.split(theta).values()]
        self._sizes = [part.numel() for part in self._parts]
        self.separable = _separable(obj)
        widest, total = _example_bytes(obj, theta)
        self._example_bytes = total
        self.tile = self._tile_size(widest, total)
        self._held: list[Values] | None = []
        batch = next(self._tiles())
        self._program(batch.inputs)  # raises, if it will not do

    # -- tiles -----------------------------------------------------------------------------

    def _tile_size(self, widest: int, total: int) -> int:
        count = self.obj.num_examples
        if not self.separable:
            return count
        # A product holds the tangents of all layers twice, forward and backward.
        most = self.budget // max(1, 3 * WIDTH * total)
        if self.obj.device.type == "cpu":
            most = min(most, CPU_TILE_EXAMPLES, CPU_TILE // max(1, WIDTH * widest))
        else:
            most = min(most, GPU_TILE_EXAMPLES)
        most = max(1, most)
        return ceil(count / ceil(count / most))

    def _tiles(self) -> Iterator[Tile]:
        if not self.separable:
            for batch in self.obj.batches():
                yield Tile(batch.inputs, batch.targets, self._ones(len(batch.inputs)))
            return
        for batch in self.obj.batches(batch_size=self.tile):
            n, missing = len(batch.inputs), self.tile - len(batch.inputs)
            weights = self._ones(self.tile)
            weights[n:] = 0
            yield Tile(_filled(batch.inputs, missing), _filled(batch.targets, missing), weights)

    def _ones(self, n: int) -> Tensor:
        return torch.ones(n, dtype=self.theta.dtype, device=self.theta.device)

    def _program(self, inputs: Tensor) -> Program:
        return program_for(self.obj, self.theta, inputs)

    # -- results ---------------------------------------------------------------------------

    @exact_math()
    @torch.no_grad()
    def products(self, rows: Tensor, kind: str) -> Tensor:
        """Products of the summed loss's "hessian", "ggn" or "fisher" with rows [K, P]."""
        total = torch.zeros_like(rows)
        for tile in self._tiles():
            values, loss = self._at(tile, kind)
            for i in range(0, len(rows), WIDTH):
                block = rows[i : i + WIDTH]
                total[i : i + WIDTH] += self._product(values, loss, block, kind)
        return total

    @exact_math()
    @torch.no_grad()
    def forms(self, rows: Tensor) -> Tensor:
        """v^T H v of the summed loss for rows v [K, P].  # [K] float64"""
        total = rows.new_zeros(len(rows), dtype=torch.float64)
        for tile in self._tiles():
            values, loss = self._at(tile, "forms")
            for i in range(0, len(rows), WIDTH):
                block = rows[i : i + WIDTH]
                moved, found = values.program.forms(values, self._directions(block))
                if moved is not None:
                    found = found + (moved * loss.hessian(moved)).flatten(1).sum(
                        1, dtype=torch.float64
                    )
                total[i : i + WIDTH] += found
        return total

    def _product(self, values: Values, loss: LossAt, rows: Tensor, kind: str) -> Tensor:
        program = values.program
        tangents = program.push(values, self._directions(rows), keep=kind == "hessian")
        moved = tangents.get(program.graph.outputs)
        if moved is None:  # outputs that do not depend on the parameters
            return torch.zeros_like(rows)
        u = loss.fisher(moved) if kind == "fisher" else loss.hessian(moved)
        gradients = program.pull(values, tangents if kind == "hessian" else {}, u)
        found = [
            rows.new_zeros(len(rows), size) if g is None else g.reshape(len(rows), -1)
            for g, size in zip(gradients, self._sizes, strict=True)
        ]
        return torch.cat(found, 1)

    def _directions(self, rows: Tensor) -> list[Tensor]:
        return [
            part.reshape(len(rows), *like.shape)
            for part, like in zip(rows.split(self._sizes, 1), self._parts, strict=True)
        ]

    def _at(self, tile: Tile, kind: str) -> tuple[Values, LossAt]:
        program = self._program(tile.inputs)
        values = program.forward(self._parts, self.obj.buffers.values(), tile.inputs)
        loss = LossAt(self.obj, values[program.graph.outputs], tile.targets, tile.weights)
        if kind in ("hessian", "forms"):
            program.backward(values, loss.gradient)
        program.prepare(values)
        return values, loss


# Programs of a model, by what they depend on; or why there is none.
_programs: WeakKeyDictionary[Any, OrderedDict[Any, Program | NotCapturedError]]
_programs = WeakKeyDictionary()
_lock = threading.Lock()


def program_for(obj: Objective, theta: Tensor, inputs: Tensor) -> Program:
    """The program of an objective's model for inputs like these, captured once."""
    key = (inputs.shape, inputs.dtype, inputs.device, theta.dtype, tuple(obj.buffers))
    with _lock:
        known = _programs.setdefault(obj._model, OrderedDict())
        if key in known:
            known.move_to_end(key)
        else:
            try:
                known[key] = Program(capture(obj, theta, inputs))
            except NotCapturedError as why:
                known[key] = why
            while len(known) > PROGRAMS:
                known.popitem(last=False)
        found = known[key]
    if isinstance(found, NotCapturedError):
        raise found
    return found


def _separable(obj: Objective) -> bool:
    """Whether the loss is a sum over examples that can be taken a few at a time."""
    try:
        obj.require_single_examples()
    except ValueError:
        return False
    return True


def _filled(tensor: Tensor, missing: int) -> Tensor:
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


class _Meter(TorchDispatchMode):
    """Bytes of the results of operations, the largest and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                size = leaf.element_size() * prod(leaf.shape)
                self.widest, self.total = max(self.widest, size), self.total + size
        return results


def _example_bytes(obj: Objective, theta: Tensor) -> tuple[int, int]:
    """Bytes of an example's activations: of the widest layer, and of all."""
    batch = next(obj.batches(2 if obj.num_examples > 1 else 1))
    with torch.no_grad(), _Meter() as meter:
        obj.outputs(theta, batch.inputs)
    n = len(batch.inputs)
    return meter.widest // n, meter.total // n
