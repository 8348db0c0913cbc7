"""Whole cycles of a run as CUDA graphs: one launch for k updates and a projection."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..devices import is_gpu
from .run import Run

WARM_UP = 2  # cycles done before one is captured: libraries choose and load their kernels in them
# A capture costs 0.1 to 1 s, as much as a few to a hundred cycles. So after each the next waits for
# twice as many cycles without a dropped replica, up to these: of 64 that diverge one by one few
# are followed by a capture.
MOST_PATIENCE = 64


class Cycles:
    """Runs cycles, on a CUDA device as a graph once they are warm.

    A graph holds gradients, optimizer and projection of a whole cycle. It reads the examples of
    its minibatches from one table, which is filled before each launch, on the device. When a
    replica is dropped, tensors are new: cycles run as they are, for twice as long after every
    capture, and are then captured again. Where capture
    fails, cycles run as they are, and `note` says why.

    Args:
        run: whose cycles.
        size: updates of an ordinary cycle; a last, shorter one is not captured.
        graphs: False to run all as they are.

    Attributes:
        captured: whether a graph has run.
        note: why none did; "" if there is nothing to say.
    """

    def __init__(self, run: Run, size: int, graphs: bool = True) -> None:
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
        if self._warm < self._patience:
            self._run.cycle(count, self._on_side_stream)
            self._warm += 1
            return
        self._run.cycle(count, self._launch)

    def _on_side_stream(self, table: Tensor) -> None:
        device = self._run.theta.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._run.updates(table)
        torch.cuda.current_stream(device).wait_stream(stream)

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
        device = table.device
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # torch's own stream for captures belongs to the device that was current at the first.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._table = table.clone()
        try:
            # A capture that fails does not leave its stream: the outer block does.
            with (
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, stream=stream),
            ):
                self._run.updates(self._table)
        # A model may refuse capture in any way, by reading a value back for instance.
        except Exception as error:
            _end_pool(device, pool)
            torch.cuda.synchronize(device)
            lines = str(error).splitlines()
            self._enabled = False
            self.note = f"CUDA graphs were not used: {type(error).__name__}: {(lines or [''])[0]}"
            return
        self._graph, self.captured = graph, True
        self._patience = min(2 * self._patience, MOST_PATIENCE)


def _end_pool(device: torch.device, pool: Any) -> None:
    """What torch leaves open where ending a capture fails: all memory would come from the pool."""
    with contextlib.suppress(RuntimeError, AttributeError):  # ended already; no CUDA build
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
