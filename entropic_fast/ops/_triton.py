"""What every family's Triton kernels share: launches, loops and a probe."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast._utils.devices import is_gpu

# Explicit, because Triton's default changes between releases.
FUSE = {"enable_fp_fusion": True}

# The precision in force -> Triton's name for how tl.dot computes products.
INPUT_PRECISION = {"float64": "ieee", "float32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launched inside run on the tensor's GPU."""
    on_gpu = is_gpu(tensor.device)
    return torch.cuda.device(tensor.device) if on_gpu else contextlib.nullcontext()


# `count(start, stop, step)` is tl.range with bounds known only at run time. The interpreter of
# Triton 3.6 applies int() to a one-element array, which NumPy 2.4 rejects: there `count` unpacks
# the bounds itself.
if triton.knobs.runtime.interpret:

    def count(start, stop, step=1):
        bounds = (start, stop, step)
        return range(
            *(int(b.handle.data.item()) if isinstance(b, tl.tensor) else b for b in bounds)
        )

else:
    count = tl.range


@triton.jit
def double_kernel(x, COUNT: tl.constexpr):
    where = tl.arange(0, COUNT)
    tl.store(x + where, 2 * tl.load(x + where))


def probe(device: torch.device) -> Tensor:
    """Double the numbers 0 to 15 on a device and wait, to see whether Triton works there."""
    x = torch.arange(16, dtype=torch.float32, device=device)
    with on_device(x):
        double_kernel[(1,)](x, COUNT=16)
    if x.tolist() != [2.0 * i for i in range(16)]:
        raise RuntimeError(f"a trivial kernel computed {x.tolist()}")
    return x
