"""A trivial kernel, which shows whether Triton works on this machine."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_launch import on_device


@triton.jit
def double(x, COUNT: tl.constexpr):
    where = tl.arange(0, COUNT)
    tl.store(x + where, 2 * tl.load(x + where))


def run(device: torch.device) -> Tensor:
    """Double the numbers 0 to 15 on a device, and wait for them.

    Raises:
        RuntimeError: they came out wrong; whatever Triton raises where it cannot compile.
    """
    x = torch.arange(16, dtype=torch.float32, device=device)
    with on_device(x):
        double[(1,)](x, COUNT=16)
    if x.tolist() != [2.0 * i for i in range(16)]:
        raise RuntimeError(f"a trivial kernel computed {x.tolist()}")
    return x
