"""The memory layout in which a network takes its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fitting_layout(forward: Callable[[Tensor], Tensor], images: Tensor) -> torch.memory_format:
    """Channels last, in which convolutions are quicker, unless the network cannot take it.

    One that calls `view` on what a convolution returns needs its numbers in the usual order.

    Args:
        forward: the network, or a copy where statistics must not move; called on two images.
        images: anything that is not [N, C, H, W] has the usual layout.

    >>> images = torch.zeros(2, 3, 4, 4)
    >>> fitting_layout(torch.nn.Conv2d(3, 2, 3), images)
    torch.channels_last
    >>> fitting_layout(lambda x: torch.relu(x).view(len(x), -1), images)
    torch.contiguous_format
    """
    if images.ndim != 4:
        return torch.contiguous_format
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            forward(images[:2].contiguous(memory_format=torch.channels_last))
    except Exception:  # whatever else is wrong will be said where the network is used
        return torch.contiguous_format
    return torch.channels_last
