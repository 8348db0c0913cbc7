"""Products of tiles whose values are kept, as CUDA graphs: one launch where there were hundreds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...cuda_graphs import captured

logger = logging.getLogger(__name__)


class _Buffers:
    """Memory that graphs read vectors from, and add results to."""

    def __init__(self, rows: Tensor, total: Tensor) -> None:
        self.rows, self.total = torch.empty_like(rows), torch.zeros_like(total)
        self._loaded: tuple[Tensor, Tensor] | None = None

    def load(self, rows: Tensor, total: Tensor) -> None:
        """Take vectors, unless they are there; results will be added to `total`."""
        if self._loaded is not None and self._loaded[0] is rows:
            return
        self.flush()
        self.rows.copy_(rows)
        self._loaded = (rows, total)

    def flush(self) -> None:
        """Add what graphs have found since the last time."""
        if self._loaded is not None:
            self._loaded[1].add_(self.total)
            self.total.zero_()
            self._loaded = None


class TileGraphs:
    """Captures work on tiles at its first repetition, and replays it from then on.

    The work must read nothing back, and everything it reads but the vectors must stay where it is.
    Where a capture fails, that work and all later work runs as it is, and a log entry says why.
    Graphs share one memory pool: nothing of a replay is used later but what it adds to the totals.

    Args:
        enabled: whether the device has such graphs.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._buffers: dict[Any, _Buffers] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def session(self) -> AbstractContextManager[Any]:
        """To hold while a product runs: threads that share an engine share the buffers."""
        return self._lock if self.enabled else nullcontext()

    def run(
        self, key: Hashable, work: Callable[[Tensor, Tensor], None], rows: Tensor, total: Tensor
    ) -> None:
        """Add what `work` adds for vectors `rows` to `total`, by a graph if it can be captured.

        Args:
            key: of the work; the same for the same work on vectors of the same shape.
        """
        if not self.enabled:
            work(rows, total)
            return
        shapes = (rows.shape, total.shape, total.dtype)
        if shapes not in self._buffers:
            self._buffers[shapes] = _Buffers(rows, total)
        buffers = self._buffers[shapes]
        graph = self._graphs.get((key, shapes)) or self._captured((key, shapes), work, buffers)
        if graph is None:
            work(rows, total)
            return
        buffers.load(rows, total)
        graph.replay()

    def flush(self) -> None:
        """Put results where they belong; to be called when a product has seen all tiles."""
        for buffers in self._buffers.values():
            buffers.flush()

    def _captured(
        self, key: Hashable, work: Callable[[Tensor, Tensor], None], buffers: _Buffers
    ) -> torch.cuda.CUDAGraph | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, note = captured(
            lambda: work(buffers.rows, buffers.total), buffers.rows.device, self._pool
        )
        if graph is None:
            self.enabled = False
            self.flush()
            self._graphs.clear()
            logger.info("products: %s", note)
            return None
        self._graphs[key] = graph
        return graph
