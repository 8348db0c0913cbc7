"""Work on tensors as a CUDA graph: one launch once it is warm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch.cuda_graphs import WARM_UP, captured, on_side_stream
from .._utils.devices import is_gpu

SHAPES = 4  # of arguments, for which a graph is kept


class Replayed:
    """A procedure on tensors; on a GPU a CUDA graph, from its third call for the same shapes on.

    The graph reads its arguments from buffers, and all else where it was at capture: the procedure
    changes tensors in place and reads no value back. Where capture fails it runs directly, and
    `note` says why.
    """

    def __init__(
        self, work: Callable[..., object], device: torch.device, graphs: bool = True
    ) -> None:
        self._work, self._device = work, device
        self._enabled = graphs and is_gpu(device)
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.captured, self.note = False, ""

    def __call__(self, *tensors: Tensor) -> None:
        key = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if not self._enabled:
            self._work(*tensors)
        elif key in self._graphs:
            graph, places = self._graphs[key]
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
            graph.replay()
        elif len(self._graphs) == SHAPES:
            self._work(*tensors)
        elif calls <= WARM_UP:
            on_side_stream(lambda: self._work(*tensors), self._device)
        else:
            self._capture(key, tensors)

    def close(self) -> None:
        """Release the graphs and their memory."""
        self._graphs.clear()
        self._enabled = False

    def _capture(self, key: Any, tensors: tuple[Tensor, ...]) -> None:
        """Capture a graph, in which nothing is computed, and launch it."""
        places = [t.clone() for t in tensors]
        graph, self.note = captured(lambda: self._work(*places), self._device)
        if graph is None:
            self._enabled = False
            self._work(*tensors)
            return
        self._graphs[key] = graph, places
        graph.replay()
        self.captured = True
