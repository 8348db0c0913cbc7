"""What launches of the score kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .._utils.devices import is_gpu

# Said openly, because Triton's default changes between releases.
FUSE = {"enable_fp_fusion": True}

# What is computed -> Triton's name for how tl.dot takes products.
INPUT_PRECISION = {"float64": "ieee", "float32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launched inside run on the tensor's GPU."""
    on_gpu = is_gpu(tensor.device)
    return torch.cuda.device(tensor.device) if on_gpu else contextlib.nullcontext()
