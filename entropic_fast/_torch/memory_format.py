"""The memory layout in which a network takes its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._utils.devices import is_gpu
from .._utils.trees import Tree


def preferred_memory_format(
    forward: Callable[[Tensor], Tensor], images: Tree
) -> torch.memory_format:
    """Channels last, in which convolutions are faster, unless the network cannot take it.

    `view` on the output of a convolution, for one, needs the contiguous layout. Two images are
    tried, forward and backward, in both layouts, and outputs have to agree; `forward` must not
    update statistics. Convolutions as in `overruns_channels_last` have the contiguous layout on a
    CPU.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        return torch.contiguous_format
    usual = images[:2].detach().contiguous()
    last = usual.contiguous(memory_format=torch.channels_last).requires_grad_()
    devices = [images.device] if is_gpu(images.device) else []
    convolutions = _Convolutions()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            with convolutions:
                expected = forward(usual).detach()
            if convolutions.overrun and not devices:
                return torch.contiguous_format
            outputs = forward(last)
            torch.autograd.grad(outputs.sum(), last)
    except Exception:  # other errors are reported where the network is used
        return torch.contiguous_format
    size = float(expected.abs().max()) if expected.numel() else 0.0
    same = torch.allclose(outputs.detach(), expected, rtol=0, atol=1e-2 * size, equal_nan=True)
    return torch.channels_last if same else torch.contiguous_format


def overruns_channels_last(weight: Sequence[int], stride: Sequence[int], groups: int = 1) -> bool:
    """Whether torch's weight gradient of this convolution writes outside its memory on a CPU.

    With channels last, a 1 x 1 kernel, a stride and 2 to 6 input channels, oneDNN does (torch 2.14,
    float32, a processor without AVX-512). On one thread the process usually crashes; on two,
    training ended with other weights. Up to 7 channels count as unsafe.
    """
    kernel, channels = tuple(weight[2:]), weight[1]
    return kernel == (1, 1) and groups == 1 and channels < 8 and max(stride) > 1


class _Convolutions(TorchFunctionMode):
    """Notes whether a convolution within it is one of `overruns_channels_last`."""

    overrun = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            given = dict(zip(("input", "weight", "bias", "stride"), args, strict=False)) | kwargs
            stride = given.get("stride", 1)
            strides = (stride,) if isinstance(stride, int) else tuple(stride)
            groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            self.overrun |= overruns_channels_last(given["weight"].shape, strides, groups)
        return func(*args, **kwargs)


def laid_out(inputs: Tree, layout: torch.memory_format) -> Tree:
    """Inputs in a memory layout, if they are images [N, C, H, W]."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=layout)
    return inputs
