"""Cycles of a run as CUDA graphs: one launch for k updates and a projection."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.cuda_graphs import WARM_UP, captured, on_side_stream
from ..._utils.devices import is_gpu
from ._replica_state import ReplicaState

# A capture costs 0.1 to 1 s, as much as a few to a hundred cycles. So after each capture the next
# waits for twice as many cycles without a dropped replica, up to this number: if 64 replicas
# diverge one by one, few of them cost a capture.
MOST_PATIENCE = 64


class GraphedCycles:
    """Runs cycles, on a GPU as one CUDA graph (k updates and a projection) after a warm-up.

    A dropped replica makes new tensors, so the graph is captured again, after twice as many plain
    cycles as the time before. Where capture fails, cycles stay plain and `note` says why.
    """

    def __init__(self, run: ReplicaState, size: int, graphs: bool = True) -> None:
        self._run, self._size = run, size
        self._enabled = graphs and is_gpu(run.theta.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._table = torch.empty(0)
        self._warm, self._theta = 0, run.theta
        self._patience = WARM_UP
        self.captured, self.note = False, ""

    def __call__(self, count: int) -> None:
        """One cycle of `count` updates."""
        if not self._enabled or count != self._size:
            self._run.cycle(count)
            return
        if self._run.theta is not self._theta:  # replicas were dropped
            self._graph, self._warm, self._theta = None, 0, self._run.theta
        if self._graph is None and self._warm < self._patience:
            self._run.cycle(count, self._on_side_stream)
            self._warm += 1
            return
        self._run.cycle(count, self._launch)

    def _on_side_stream(self, table: Tensor) -> None:
        on_side_stream(lambda: self._run.updates(table), self._run.theta.device)

    def _launch(self, table: Tensor) -> None:
        if self._graph is None:
            self._capture(table)
        if self._graph is None:
            self._run.updates(table)
            return
        self._table.copy_(table)
        self._graph.replay()

    def _capture(self, table: Tensor) -> None:
        # Nothing is computed while a graph is captured: the run's numbers stay as they are.
        self._table = table.clone()
        self._graph, self.note = captured(lambda: self._run.updates(self._table), table.device)
        self._enabled = self._graph is not None
        self.captured = self.captured or self._enabled
        self._patience = min(2 * self._patience, MOST_PATIENCE)
