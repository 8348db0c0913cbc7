"""Capture of work as a CUDA graph, with its warm-up and the cleanup after a failure."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "ENTROPIC_FAST_CUDA_GRAPHS"
WARM_UP = 2  # runs before a capture: libraries choose and load their kernels in them

_local = threading.local()


def switched_off() -> str:
    """Why CUDA graphs are not to be used; "" if they are."""
    return f"CUDA graphs were not used: {VARIABLE}=0" if os.environ.get(VARIABLE) == "0" else ""


class GraphMemory:
    """Memory common to graphs of which none is read after another has run.

    They must be captured on one stream too: torch's allocator keeps free memory by stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def side_stream(device: torch.device) -> Any:
    """A stream of a GPU other than the default, the same at every call of a thread."""
    streams: dict[torch.device, Any] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


def on_side_stream(work: Callable[[], object], device: torch.device) -> None:
    """`work()` as it must run before it is captured, on a stream other than the current one."""
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(
    work: Callable[[], object], device: torch.device, memory: GraphMemory | None = None
) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """The graph of `work()`, which is not run; or None, and a note of the reason.

    `work` reads no value back, and finds its inputs at the same addresses.
    """
    if switched_off():
        return None, switched_off()
    if torch.cuda.is_current_stream_capturing():
        return None, "CUDA graphs were not used: the caller is capturing one"
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if memory is None else memory.pool
    # torch's own stream for captures belongs to the device that was current at the first.
    stream = side_stream(device) if memory is None else memory.stream
    try:
        # A failed capture does not leave its stream; the outer block does. In the mode "global" an
        # allocation by another thread would end the capture.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
    # A model may reject capture in any way, by reading a value back for instance.
    except Exception as error:
        _end_pool(device, pool)
        torch.cuda.synchronize(device)
        lines = str(error).splitlines()
        return None, f"CUDA graphs were not used: {type(error).__name__}: {(lines or [''])[0]}"
    return graph, ""


def _end_pool(device: torch.device, pool: Any) -> None:
    """Close what torch leaves open after a failed capture: all memory would come from the pool."""
    with contextlib.suppress(RuntimeError, AttributeError):  # ended already; no CUDA build
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
