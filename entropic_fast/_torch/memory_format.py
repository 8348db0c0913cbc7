"""The memory layout in which a network takes its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._utils.devices import is_gpu
from .._utils.trees import Tree


def preferred_memory_format(
    forward: Callable[[Tensor], Tensor], images: Tree
) -> torch.memory_format:
    """Channels last, in which convolutions are quicker, unless the network cannot take it.

    One that calls `view` on what a convolution returns needs its numbers in the usual order. Two
    images are tried, forwards and backwards, in both layouts: outputs have to agree.

    Args:
        forward: the network, which must not move statistics.
        images: anything that is not [N, C, H, W] has the usual layout.

    >>> images = torch.zeros(2, 3, 4, 4)
    >>> preferred_memory_format(torch.nn.Conv2d(3, 2, 3), images)
    torch.channels_last
    >>> preferred_memory_format(lambda x: torch.relu(x).view(len(x), -1), images)
    torch.contiguous_format
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        return torch.contiguous_format
    usual = images[:2].detach().contiguous()
    last = usual.contiguous(memory_format=torch.channels_last).requires_grad_()
    devices = [images.device] if is_gpu(images.device) else []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            expected, found = forward(usual).detach(), forward(last)
            torch.autograd.grad(found.sum(), last)
    except Exception:  # whatever else is wrong will be said where the network is used
        return torch.contiguous_format
    size = float(expected.abs().max()) if expected.numel() else 0.0
    same = torch.allclose(found.detach(), expected, rtol=0, atol=1e-2 * size, equal_nan=True)
    return torch.channels_last if same else torch.contiguous_format


def laid_out(inputs: Tree, layout: torch.memory_format) -> Tree:
    """Inputs in a memory layout, if they are images [N, C, H, W]."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=layout)
    return inputs
