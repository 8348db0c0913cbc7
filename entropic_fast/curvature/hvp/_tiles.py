"""Tiles: the examples and directions computed at once, as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..._utils import trees
from ..._utils.devices import is_gpu
from ...objective import Objective
from ...objective.data import Batch
from ._capture_checks import GraphCaptureError

Batches = Callable[..., Iterator[Batch]]  # an objective's `batches` or `local_batches`

# Most directions at once. Probes come in blocks of 8; on a GPU a second pass over the values costs
# as many launches as the first.
WIDTH = 4
GPU_WIDTH = 8
# Bytes of tangents of the widest layer on a CPU. From 32 MiB on glibc serves every tensor by mmap,
# and the kernel clears its pages again at each use.
CPU_TILE = 31 * 2**20
# With fewer examples than this in a tile, directions are halved instead: each tile adds [K, P]
# results, and small batches convolve slower. Cost per product at a fixed point, in plain gradients
# (medians of few rounds): WRN-16-4 2.01 with 22 examples x 4 directions, 1.73 with 32 x 2, 1.94
# with 64 x 1; ResNet-20 1.49 and 1.60 with 64 x 4, 1.59 and 1.59 with 43 x 4.
ENOUGH_EXAMPLES = 32
CPU_EXAMPLES = 1024
GPU_EXAMPLES = 512
# Most input shapes of an engine, and interpreters kept for a model.
SHAPES = 64


class Tile(NamedTuple):
    """Examples, padded to the size of the other tiles by examples of weight 0."""

    start: int
    inputs: Tensor
    targets: Tensor
    weights: Tensor  # [n]

    @property
    def batch(self) -> Batch:
        """The examples of weight 1."""
        n = int(self.weights.sum())
        return Batch(self.start, self.inputs, self.targets).cut(0, n)


class Tiling:
    """The tiles of an objective at a point: `size` examples and `width` directions at once."""

    def __init__(self, obj: Objective, theta: Tensor, budget: int) -> None:
        self.obj, self.budget = obj, budget
        self.separable = obj.separable
        self.width, self.size = self._sizes_within(*_example_bytes(obj, theta))

    def _sizes_within(self, widest: int, total: int) -> tuple[int, int]:
        """Directions and examples at once, from an example's bytes in the widest layer and all."""
        count = _longest_run(self.obj)
        # A product holds the tangents of the forward pass, and the values of both passes; on a GPU
        # the same again in the memory of CUDA graphs.
        gpu = is_gpu(self.obj.device)
        width, room = (GPU_WIDTH, self.budget // 4) if gpu else (WIDTH, self.budget // 2)
        example_bytes = 2 * total
        if not self.separable:
            # Examples that interact are one tile, however large.
            largest = max(batch.size for batch in self.obj.batches())
            return max(1, min(width, room // (largest * example_bytes) - 1)), largest
        if self.obj.device.type == "cpu":
            if CPU_TILE // max(1, width * widest) < ENOUGH_EXAMPLES:
                width //= 2
            most = min(CPU_EXAMPLES, CPU_TILE // max(1, width * widest))
        else:
            most = GPU_EXAMPLES
        most = max(1, min(most, room // ((width + 1) * example_bytes)))
        width = max(1, min(width, room // (most * example_bytes) - 1))
        return width, ceil(count / ceil(count / most))

    def tiles(self, read: Batches | None = None) -> Iterator[Tile]:
        """All examples tile by tile, or those that `read` yields, as `local_batches`."""
        read = read or self.obj.batches
        if not self.separable:
            for batch in read():
                yield Tile(*batch, self._weights(batch.size, batch.size))
            return
        for batch in _regrouped(read, self.size):
            yield self._filled(batch)

    def _weights(self, n: int, counted: int) -> Tensor:
        weights = torch.zeros(n, dtype=self.obj.dtype, device=self.obj.device)
        weights[:counted] = 1
        return weights

    def first_of_each_shape(self) -> Iterator[Tile]:
        """One tile per input shape."""
        seen = set()
        for tile in self.tiles():
            if trees.form(tile.inputs) in seen:
                continue
            seen.add(trees.form(tile.inputs))
            if len(seen) > SHAPES:
                raise GraphCaptureError(f"inputs come in more than {SHAPES} shapes")
            yield tile
            if self.separable and self.obj.examples.are_tensors:  # all tiles are alike
                return

    def samples(self) -> Iterator[Tile]:
        """One tile per input shape with two examples of weight 1, or a batch that interacts."""
        for first in self.first_of_each_shape():
            if not self.separable:
                yield first
                continue
            yield self._filled(first.batch.cut(0, min(2, first.batch.size)))

    def _filled(self, batch: Batch) -> Tile:
        """A batch padded to the tile's size by examples of weight 0."""
        # Weight 0 makes their cotangents 0: they add exact zeros to every sum.
        missing, weights = self.size - batch.size, self._weights(self.size, batch.size)
        inputs, targets = trees.mapped(lambda tensor: _filled(tensor, missing), batch[1:])
        return Tile(batch.start, inputs, targets, weights)


def _alike(a: Batch, b: Batch) -> bool:
    """Whether batches can be concatenated."""
    return trees.example_form(a[1:]) == trees.example_form(b[1:])


def _longest_run(obj: Objective) -> int:
    """The most consecutive examples of this process that can be concatenated."""
    if obj.examples.are_tensors:
        begin, end = obj.local_range()
        return max(1, end - begin)
    longest = run = 0
    last = None
    for batch in obj.batches():
        run = batch.size + (run if last is not None and _alike(last, batch) else 0)
        longest, last = max(longest, run), batch
    return longest


def _regrouped(read: Batches, size: int) -> Iterator[Batch]:
    """Examples in order, in batches of `size` where consecutive ones can be concatenated."""
    held = None
    for batch in read(batch_size=size):
        # Tiles of one size share a graph and, on a GPU, its CUDA graphs.
        if held is not None and _alike(held, batch):
            inputs, targets = trees.joined([held[1:], batch[1:]])
            held = Batch(held.start, inputs, targets)
        else:
            if held is not None:
                yield held
            held = batch
        if held.size >= size:
            yield held.cut(0, size)
            held = held.cut(size, held.size) if held.size > size else None
    if held is not None:
        yield held


def _filled(tensor: Tensor, missing: int) -> Tensor:
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


class _Meter(TorchDispatchMode):
    """Bytes of the results of operations, the largest and the sum; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # Storages are compared, not addresses: those of forward mode have none.
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                size = leaf.element_size() * prod(leaf.shape)
                self.widest, self.total = max(self.widest, size), self.total + size
        return results


def _example_bytes(obj: Objective, theta: Tensor) -> tuple[int, int]:
    """Bytes of an example's activations: of the widest layer, and of all."""
    # `Objective.outputs` may repeat a single example, which would then count twice.
    batch = next(obj.batches(2 if obj.num_examples > 1 else 1))
    with torch.no_grad(), _Meter() as meter:
        obj.outputs(theta, batch.inputs)
    n = batch.size
    return meter.widest // n, meter.total // n
