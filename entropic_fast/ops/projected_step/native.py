"""Family `projected_step` on the compiled module: C++ for CPU tensors, CUDA C++ for CUDA tensors.

Called by `entropic_fast.ops.projected_step` with checked tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropic_fast.ops import _native as native


def _call(
    op: str,
    theta: Tensor,
    pivots: Tensor,
    products: Tensor,
    near: Tensor | None,
    *arguments: Any,
    between: Tensor | None = None,
) -> None:
    """Passes addresses, sizes and place of execution; tensors among `arguments` as addresses."""
    module = native.module()
    replicas, size = theta.shape
    count = pivots.shape[0]
    where: tuple[int, ...] = (
        theta.data_ptr(), pivots.data_ptr(), products.data_ptr(), replicas, size, count
    )  # fmt: skip
    dtype = "float32" if theta.dtype == torch.float32 else "float64"
    if theta.device.type == "cpu":
        entry = getattr(module, f"{op}_cpu_{dtype}")
        where += (native.threads(), *(0 if t is None else t.data_ptr() for t in (near, between)))
    else:
        entry = getattr(module, f"{op}_cuda_{dtype}")
        # Freed when this returns: the caching allocator reuses it in stream order.
        workspace = torch.empty(
            module.step_workspace(replicas, size, count), dtype=torch.float64, device=theta.device
        )
        stream = torch.cuda.current_stream(theta.device).cuda_stream
        index = theta.device.index
        where += (workspace.data_ptr(), index, stream)
    entry(where, *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def _new_products(theta: Tensor, pivots: Tensor) -> Tensor:
    shape = (theta.shape[0], 2, pivots.shape[0])
    if theta.device.type != "cpu":  # the kernels write every entry, and a fill would be a launch
        return torch.empty(shape, dtype=torch.float64, device=theta.device)
    return torch.full(shape, torch.nan, dtype=torch.float64, device=theta.device)


def sgd_step(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    pivots: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    near: Tensor | None = None,
) -> Tensor:
    products = _new_products(theta, pivots)
    _call(
        "sgd_step", theta, pivots, products, near, grad, momentum_buffer, lr,
        momentum, dampening, weight_decay, nesterov, first,
    )  # fmt: skip
    return products


def adam_step(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    pivots: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    near: Tensor | None = None,
) -> Tensor:
    products = _new_products(theta, pivots)
    _call(
        "adam_step", theta, pivots, products, near, grad, exp_avg, exp_avg_sq, step, lr,
        beta1, beta2, eps, weight_decay, decoupled,
    )  # fmt: skip
    return products


def project_step(
    theta: Tensor,
    products: Tensor,
    pivots: Tensor,
    segment_squares: Tensor,
    near: Tensor | None = None,
    between: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    replicas, device = theta.shape[0], theta.device
    segment = torch.empty(replicas, dtype=torch.int64, device=device)
    t = torch.empty(replicas, dtype=torch.float64, device=device)
    distance = torch.empty(replicas, dtype=torch.float64, device=device)
    _call(
        "project_step", theta, pivots, products, near, segment_squares, segment, t, distance,
        between=between,
    )  # fmt: skip
    return segment, t, distance
