"""Products and quadratic forms of an objective's curvature, a tile of examples at a time."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil, prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...devices import is_gpu
from ...exact import exact_math
from ...examples import Batch
from ...forward_mode import forward_lock
from ...objective import Objective
from ...parameters import model_lock
from .allocator import keep_freed_memory
from .capture import capture
from .hidden import NotCapturedError
from .loss import LossAt
from .program import Program, Values
from .step import Sum
from .tile_graphs import TileGraphs

logger = logging.getLogger(__name__)

Batches = Callable[..., Iterator[Batch]]  # an objective's `batches` or `own_batches`

# Directions taken at once, at most. Probes come in blocks of 8; on a GPU a second pass over the
# values costs as many launches as the first.
WIDTH = 4
GPU_WIDTH = 8
# Bytes that the tangents of the widest layer may take on a CPU. Over 32 MiB the C library takes
# every tensor from the system, and its pages are cleared anew at each use.
CPU_TILE = 31 * 2**20
# Fewer directions at once rather than fewer examples: each tile adds [K, P] results, and small
# batches convolve slower. Each of four products at a fixed point, in plain gradients (medians of
# few rounds): WRN-16-4 2.01 with 22 examples x 4, 1.73 with 32 x 2, 1.94 with 64 x 1; ResNet-20
# 1.49 and 1.60 with 64 x 4, 1.59 and 1.59 with 43 x 4.
ENOUGH_EXAMPLES = 32
CPU_EXAMPLES = 1024
GPU_EXAMPLES = 512
# Share of the budget for values that are kept. Half of it is for what a call takes; the rest is
# for what the C library leaves unused between tensors, up to a sixth of a small budget.
KEPT = 1 / 3
# Shapes of inputs that an engine takes, and programs kept for a model.
SHAPES = 64


class Tile(NamedTuple):
    """Examples, filled up to the size of the other tiles; those that fill weigh 0."""

    start: int
    inputs: Tensor
    targets: Tensor
    weights: Tensor  # [n]

    @property
    def batch(self) -> Batch:
        """The examples that count."""
        n = int(self.weights.sum())
        return Batch(self.start, self.inputs[:n], self.targets[:n])


class JetEngine:
    """Curvature of an objective's summed loss at one point.

    Values at the point are computed anew for every call, until a second call of a kind shows
    that they are wanted again: then as many tiles' as KEPT of the budget holds are kept.

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
        self.separable = obj.separable
        self.width, self.tile = self._sizes_within(*_example_bytes(obj, theta))
        if obj.device.type == "cpu":
            keep_freed_memory()
        self._calls: set[str] = set()
        self._keeping = threading.Lock()  # held to change what is kept: threads may share it
        self._kept: dict[tuple[str, int], tuple[Values, LossAt]] = {}
        self._kept_bytes = 0
        self._graphs = TileGraphs(is_gpu(obj.device))
        self._programs: dict[Any, Program] = {}
        for tile in self._first_of_each_shape():
            self._programs[_like(tile.inputs)] = program_for(obj, theta, tile.inputs)

    # -- tiles -----------------------------------------------------------------------------

    def _sizes_within(self, widest: int, total: int) -> tuple[int, int]:
        """Directions and examples to take at once.

        Args:
            widest, total: bytes of an example's activations, in the widest layer and in all.
        """
        count = _longest_run(self.obj)
        # A product holds the tangents of all layers ahead, and values ahead and behind.
        width = GPU_WIDTH if is_gpu(self.obj.device) else WIDTH
        each, room = 2 * total, self.budget // 2
        if not self.separable:
            largest = max(len(batch.inputs) for batch in self.obj.batches())
            return max(1, min(width, room // (largest * each) - 1)), largest
        if self.obj.device.type == "cpu":
            if CPU_TILE // max(1, width * widest) < ENOUGH_EXAMPLES:
                width //= 2
            most = min(CPU_EXAMPLES, CPU_TILE // max(1, width * widest))
        else:
            most = GPU_EXAMPLES
        most = max(1, min(most, room // ((width + 1) * each)))
        width = max(1, min(width, room // (most * each) - 1))
        return width, ceil(count / ceil(count / most))

    def tiles(self, read: Batches | None = None) -> Iterator[Tile]:
        """All examples, a tile at a time; or those of the objective's `own_batches`."""
        read = read or self.obj.batches
        if not self.separable:
            for batch in read():
                yield Tile(*batch, self._weights(len(batch.inputs), len(batch.inputs)))
            return
        for start, inputs, targets in _regrouped(read, self.tile):
            missing = self.tile - len(inputs)
            weights = self._weights(self.tile, len(inputs))
            yield Tile(start, _filled(inputs, missing), _filled(targets, missing), weights)

    def _weights(self, n: int, counted: int) -> Tensor:
        weights = torch.zeros(n, dtype=self.theta.dtype, device=self.theta.device)
        weights[:counted] = 1
        return weights

    def _first_of_each_shape(self) -> Iterator[Tile]:
        seen = set()
        for tile in self.tiles():
            if _like(tile.inputs) in seen:
                continue
            seen.add(_like(tile.inputs))
            if len(seen) > SHAPES:
                raise NotCapturedError(f"inputs come in more than {SHAPES} shapes")
            yield tile
            if self.separable and self.obj.examples.are_tensors:  # all tiles are alike
                return

    def samples(self) -> Iterator[Tile]:
        """A tile of each shape, with two examples that count; of a batch not to be split, all."""
        for first in self._first_of_each_shape():
            if not self.separable:
                yield first
                continue
            counted = min(2, len(first.batch.inputs))
            rest = self.tile - counted
            yield Tile(
                first.start,
                _filled(first.inputs[:counted], rest),
                _filled(first.targets[:counted], rest),
                self._weights(self.tile, counted),
            )

    def program(self, tile: Tile) -> Program:
        """The program for a tile's shapes."""
        return self._programs[_like(tile.inputs)]

    # -- results ---------------------------------------------------------------------------

    @exact_math()
    @torch.no_grad()
    def products(self, rows: Tensor, kind: str, sample: Tile | None = None) -> Tensor:
        """Products of the summed loss's "hessian" or "ggn" with rows.  # [K, P]

        Args:
            rows: [K, P]
            sample: a tile to take instead of all examples.
        """
        total = torch.zeros_like(rows)

        def add(values: Values, loss: LossAt, block: Tensor, sums: Tensor) -> None:
            self._add_product(values, loss, block, kind, sums)

        self._over_tiles(kind, sample, rows, total, add)
        return total

    @exact_math()
    @torch.no_grad()
    def forms(
        self, rows: Tensor, sample: Tile | None = None, *, network_alone: bool = False
    ) -> Tensor:
        """v^T H v of the summed loss for rows v [K, P].  # [K] float64

        Args:
            network_alone: leave out the part of the loss, v^T G v with the Gauss-Newton matrix G.
        """
        total = rows.new_zeros(len(rows), dtype=torch.float64)

        def add(values: Values, loss: LossAt, block: Tensor, sums: Tensor) -> None:
            moved, found = values.program.forms(values, self._directions(block))
            sums += found
            if moved is not None and not network_alone:
                bent = moved.double() * loss.hessian(moved).double()
                sums += bent.flatten(1).sum(1)

        self._over_tiles("forms", sample, rows, total, add, network_alone)
        return total

    def _over_tiles(
        self,
        kind: str,
        sample: Tile | None,
        rows: Tensor,
        total: Tensor,
        add: Callable[[Values, LossAt, Tensor, Tensor], None],
        variant: bool = False,
    ) -> None:
        """Add to total [K, ...] what `add` finds for each tile and block of rows [K, P]."""
        blocks = list(self._blocks(rows, total)) if len(rows) else []
        if not blocks:
            return
        with self._graphs.session():
            for i, (values, loss) in enumerate(self._points(kind, sample)):
                graphed = sample is None and self._can_be_graphed(kind, i, loss)
                for block, sums in blocks:
                    if graphed:
                        work = partial(add, values, loss)
                        self._graphs.run((kind, i, variant), work, block, sums)
                    else:
                        add(values, loss, block, sums)
            self._graphs.flush()

    def _can_be_graphed(self, kind: str, tile: int, loss: LossAt) -> bool:
        """Whether a tile's values stay where they are, and its work reads nothing back."""
        kept = self._kept.get((kind, tile))
        is_kept = kept is not None and kept[1] is loss
        return self._graphs.enabled and is_kept and loss.launches_alone

    @exact_math()
    @torch.no_grad()
    def pushed(self, tile: Tile, rows: Tensor) -> Tensor:
        """The Jacobian of a tile's outputs times rows [K, P].  # [K, n * outputs]"""
        values = self._outputs_at(tile)
        outputs = values.program.graph.outputs
        found = rows.new_zeros(len(rows), values[outputs].numel())
        for block, part in self._blocks(rows, found):
            moved = values.program.push(values, self._directions(block)).get(outputs)
            if isinstance(moved, Sum):
                moved = moved.total()
            if moved is not None:
                part.copy_(moved.flatten(1))
        return found

    @exact_math()
    @torch.no_grad()
    def pulled(self, tile: Tile, rows: Tensor) -> Tensor:
        """Rows [K, m * outputs], of the m examples that count, times the Jacobian.  # [K, P]"""
        values = self._outputs_at(tile)
        program = values.program
        like = values[program.graph.outputs]
        total = rows.new_zeros(len(rows), len(self.theta))
        for block, sums in self._blocks(rows, total):
            u = block.new_zeros(len(block), like.numel())
            u[:, : block.shape[1]] = block
            self._add_gradients(program.pull(values, {}, u.view(-1, *like.shape)), sums)
        return total

    def _outputs_at(self, tile: Tile) -> Values:
        return self.program(tile).forward(self._parts, self.obj.buffers.values(), tile.inputs)

    def _blocks(self, rows: Tensor, total: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(rows), self.width):
            yield rows[i : i + self.width], total[i : i + self.width]

    def _add_product(
        self, values: Values, loss: LossAt, rows: Tensor, kind: str, total: Tensor
    ) -> None:
        program = values.program
        tangents = program.push(values, self._directions(rows), keep=kind == "hessian")
        moved = tangents.get(program.graph.outputs)
        if moved is None:  # outputs that do not depend on the parameters
            return
        found = program.pull(values, tangents if kind == "hessian" else {}, loss.hessian(moved))
        self._add_gradients(found, total)

    def _add_gradients(self, found: list[Tensor | None], total: Tensor) -> None:
        if is_gpu(total.device):  # two launches, not one for each parameter
            rows = [
                total.new_zeros(len(total), size) if g is None else g.reshape(len(total), -1)
                for g, size in zip(found, self._sizes, strict=True)
            ]
            total += torch.cat(rows, 1)
            return
        for part, gradient in zip(total.split(self._sizes, 1), found, strict=True):
            if gradient is not None:
                part += gradient.reshape(len(total), -1)

    def _directions(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split(self._sizes, 1)
        if is_gpu(rows.device):  # parts of their own, by one launch
            parts = torch.ops.aten.split_with_sizes_copy(rows, self._sizes, 1)
        return [
            part.reshape(len(rows), *like.shape)
            for part, like in zip(parts, self._parts, strict=True)
        ]

    def keep(self, kind: str) -> None:
        """Keep values at the point from the next call of a kind on, as far as memory allows."""
        self._calls.add(kind)

    # -- points ----------------------------------------------------------------------------

    def _points(self, kind: str, sample: Tile | None) -> Iterator[tuple[Values, LossAt]]:
        """Values and losses, tile by tile."""
        if sample is not None:
            yield self._at(sample, kind)
            return
        again = kind in self._calls
        self._calls.add(kind)
        for i, tile in enumerate(self.tiles(self.obj.own_batches)):
            known = self._kept.get((kind, i))
            if known is not None:
                yield known
                continue
            point = self._at(tile, kind)
            yield point
            if again:
                self._keep((kind, i), point)

    def _keep(self, key: tuple[str, int], point: tuple[Values, LossAt]) -> None:
        size = point[0].prune()
        with self._keeping:
            if key not in self._kept and self._kept_bytes + size <= KEPT * self.budget:
                self._kept[key] = point
                self._kept_bytes += size

    def _at(self, tile: Tile, kind: str) -> tuple[Values, LossAt]:
        program = self.program(tile)
        values = program.forward(self._parts, self.obj.buffers.values(), tile.inputs)
        loss = LossAt(self.obj, values[program.graph.outputs], tile.targets, tile.weights)
        if not bool(torch.isfinite(loss.losses).all()):
            self.obj.finite_losses(self.theta, tile.batch)  # raises, naming the example
        if kind != "ggn":
            program.backward(values, loss.gradient)
        values.read.clear()  # what comes now are tangents
        return values, loss


# Programs of a model, by what they depend on; or why there is none.
_programs: WeakKeyDictionary[Any, OrderedDict[Any, Program | NotCapturedError]]
_programs = WeakKeyDictionary()


def program_for(obj: Objective, theta: Tensor, inputs: Tensor) -> Program:
    """The program of an objective's model for inputs like these, captured once."""
    key = (*_like(inputs), theta.dtype, tuple(obj.buffers))
    with forward_lock, model_lock(obj._model):
        known = _programs.setdefault(obj._model, OrderedDict())
        if key in known:
            known.move_to_end(key)
        else:
            try:
                known[key] = Program(capture(obj, theta, inputs))
            except NotCapturedError as why:
                known[key] = why
            while len(known) > SHAPES:
                known.popitem(last=False)
        found = known[key]
    if isinstance(found, NotCapturedError):
        raise found
    return found


def _like(inputs: Tensor) -> tuple[Any, ...]:
    """What programs depend on of their inputs."""
    return inputs.shape, inputs.dtype, inputs.device


def _alike(one: Batch, other: Batch) -> bool:
    """Whether batches can be put together."""
    return all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def _longest_run(obj: Objective) -> int:
    """The most examples in a row that can be put together, of those that this process takes."""
    if obj.examples.are_tensors:
        begin, end = obj.own_range()
        return max(1, end - begin)
    longest = run = 0
    last = None
    for batch in obj.batches():
        run = len(batch.inputs) + (run if last is not None and _alike(last, batch) else 0)
        longest, last = max(longest, run), batch
    return longest


def _regrouped(read: Batches, size: int) -> Iterator[Batch]:
    """Examples in order, `size` at once wherever so many in a row can be put together."""
    held = None
    for batch in read(batch_size=size):
        if held is not None and _alike(held, batch):
            inputs, targets = (torch.cat(pair) for pair in zip(held[1:], batch[1:], strict=True))
            held = Batch(held.start, inputs, targets)
        else:
            if held is not None:
                yield held
            held = batch
        if len(held.inputs) >= size:
            start, inputs, targets = held
            yield Batch(start, inputs[:size], targets[:size])
            held = Batch(start + size, inputs[size:], targets[size:])
            held = held if len(held.inputs) else None
    if held is not None:
        yield held


def _filled(tensor: Tensor, missing: int) -> Tensor:
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


class _Meter(TorchDispatchMode):
    """Bytes of the results of operations (views are none), the largest and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
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
