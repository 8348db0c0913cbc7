"""Which torch devices are GPUs: the only module that names device types."""

from __future__ import annotations

import torch

# The tests add the type of an emulated device.
GPU_TYPES: set[str] = {"cuda"}


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device computes asynchronously, with its own memory."""
    return torch.device(device).type in GPU_TYPES
