"""CUDA graphs of the work on tiles with cached values: one launch in place of hundreds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..._torch.cuda_graphs import GraphMemory, captured, switched_off
from ..._utils.devices import is_gpu

logger = logging.getLogger(__name__)

Work = Callable[[Tensor, Tensor], None]  # of rows [K, P], adding to a total [K, ...]


# A product of ResNet-20 takes 15 launches instead of 1,360.
class TileGraphs:
    """Work on tiles for blocks of vectors, replayed as CUDA graphs once it is warm.

    The work must read nothing back, and everything it reads except the vectors must keep its
    address. Graphs read vectors from one buffer and add to another, of `room` bytes in all. If a
    capture fails, all further work runs without graphs, and `note` says why.
    """

    def __init__(self, device: torch.device, width: int, room: int) -> None:
        self._width, self._room = width, room
        self.enabled, self.note = is_gpu(device), ""
        if self.enabled and switched_off():
            self.enabled, self.note = False, switched_off()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._vectors: Tensor | None = None
        self._sums: dict[Hashable, Tensor] = {}
        self._loaded: tuple[Tensor, Tensor, Tensor] | None = None  # block, its total, the buffer's
        self._warm: set[Hashable] = set()  # kinds and widths that have run in an earlier product
        self._warming: set[Hashable] = set()
        self._memory: GraphMemory | None = None
        self._lock = threading.Lock()

    @property
    def captures(self) -> int:
        return len(self._graphs)

    def session(self) -> AbstractContextManager[Any]:
        """A context for one product: threads that share an engine share the buffers."""
        return self._lock if self.enabled else nullcontext()

    def run(self, kind: Hashable, tile: int, work: Work, rows: Tensor, total: Tensor) -> None:
        """Add what `work` adds for vectors `rows` [k, P] to `total` [k, ...].

        `kind` is the same for the same work on other tiles.
        """
        buffers = self._load(rows, total) if self.enabled else None
        if buffers is None:
            work(rows, total)
            return
        width = (kind, len(buffers[0]))
        # The first product of a width runs without capture: libraries then choose their kernels.
        if width not in self._warm:
            work(*buffers)
            self._warming.add(width)
            return
        graph = self._graphs.get((width, tile)) or self._captured((width, tile), work, buffers)
        if graph is None:
            work(rows, total)
        else:
            graph.replay()

    def flush(self) -> None:
        """Add the buffered results to the totals, at the end of a product."""
        self._unload()
        self._warm |= self._warming
        self._warming.clear()

    def _load(self, rows: Tensor, total: Tensor) -> tuple[Tensor, Tensor] | None:
        """Buffers with these vectors, padded with zeros; None if there is no room."""
        k = len(rows)
        # Padded to a power of two, so that few graphs serve any number of vectors.
        width = min(self._width, 1 << (k - 1).bit_length())
        key = (total.shape[1:], total.dtype)
        if self._vectors is None:
            self._vectors = self._buffer(rows)
        if key not in self._sums:
            self._sums[key] = self._buffer(total)
        if self._room < 0:
            self._give_up("CUDA graphs were not used: too little memory for their vectors")
            return None
        vectors, sums = self._vectors[:width], self._sums[key][:width]
        # The vectors of a single block are copied once for all tiles.
        if self._loaded is None or self._loaded[0] is not rows:
            self._unload()
            vectors[:k].copy_(rows)
            vectors[k:].zero_()
            self._loaded = (rows, total, sums)
        return vectors, sums

    def _unload(self) -> None:
        if self._loaded is not None:
            rows, total, sums = self._loaded
            total.add_(sums[: len(rows)])
            # Graphs add to this buffer: the next block starts from 0.
            sums.zero_()
            self._loaded = None

    def _buffer(self, like: Tensor) -> Tensor:
        """Zeros for a block of this width, or nothing if there is no room."""
        self._room -= self._width * like[:1].nbytes
        rows = self._width if self._room >= 0 else 0
        return like.new_zeros(rows, *like.shape[1:])

    def _captured(
        self, key: Hashable, work: Work, buffers: tuple[Tensor, Tensor]
    ) -> torch.cuda.CUDAGraph | None:
        device = buffers[0].device
        # One pool for all graphs, as a replay leaves nothing but its sums.
        self._memory = self._memory or GraphMemory(device)
        graph, note = captured(lambda: work(*buffers), device, self._memory)
        if graph is None:
            self._give_up(note)
            return None
        self._graphs[key] = graph
        return graph

    def _give_up(self, note: str) -> None:
        self.enabled, self.note = False, note
        self._unload()
        self._graphs.clear()
        self._vectors = None
        self._sums.clear()
        self._memory = None
        logger.warning("products of curvature: %s", note)
