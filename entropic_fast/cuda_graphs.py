"""Capturing work as a CUDA graph, and what is to be done before and where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 2  # runs before a capture: libraries choose and load their kernels in them


def on_side_stream(work: Callable[[], object], device: torch.device) -> None:
    """`work()` as it must run before it is captured, on a stream other than the current one."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(
    work: Callable[[], object], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """The graph of `work()`, in which nothing is computed; or None, and a note of the reason.

    Args:
        work: reads no value back, and finds what it reads where it is.
        device: a GPU.
        pool: memory that graphs share of which none is read after another has run; None for one
            of its own.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # torch's own stream for captures belongs to the device that was current at the first.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        # A capture that fails does not leave its stream: the outer block does.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream),
        ):
            work()
    # A model may refuse capture in any way, by reading a value back for instance.
    except Exception as error:
        _end_pool(device, pool)
        torch.cuda.synchronize(device)
        lines = str(error).splitlines()
        return None, f"CUDA graphs were not used: {type(error).__name__}: {(lines or [''])[0]}"
    return graph, ""


def _end_pool(device: torch.device, pool: Any) -> None:
    """What torch leaves open where ending a capture fails: all memory would come from the pool."""
    with contextlib.suppress(RuntimeError, AttributeError):  # ended already; no CUDA build
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
