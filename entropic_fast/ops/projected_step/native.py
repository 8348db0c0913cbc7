"""Family `projected_step` on the compiled module: C++ on the CPU, CUDA C++ on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.projected_step.checks import (
    AdamStep,
    ProjectStep,
    SgdStep,
    new_positions,
    new_products,
)


def sgd_step(a: SgdStep) -> Tensor:
    products = _new_products(a)
    _call(
        "sgd_step", a, products, a.grad, a.momentum_buffer, a.lr,
        a.momentum, a.dampening, a.weight_decay, a.nesterov, a.first,
    )  # fmt: skip
    return products


def adam_step(a: AdamStep) -> Tensor:
    products = _new_products(a)
    _call(
        "adam_step", a, products, a.grad, a.exp_avg, a.exp_avg_sq, a.step, a.lr,
        a.beta1, a.beta2, a.eps, a.weight_decay, a.decoupled,
    )  # fmt: skip
    return products


def project_step(a: ProjectStep) -> tuple[Tensor, Tensor, Tensor]:
    results = new_positions(a)
    _call("project_step", a, a.products, a.segment_squares, *results)
    return results


def _call(
    function: str, a: SgdStep | AdamStep | ProjectStep, products: Tensor, *values: Tensor | float
) -> None:
    (replicas, size), count = a.theta.shape, a.pivots.shape[0]
    if a.theta.device.type == "cpu":
        between = a.between if isinstance(a, ProjectStep) else None
        native.call(
            function, a.theta, a.theta, a.pivots, products, replicas, size, count,
            a.near, between, *values,
        )  # fmt: skip
        return
    # Freed when this returns: the caching allocator reuses it in stream order.
    workspace = a.theta.new_empty(workspace_doubles(replicas, size, count), dtype=torch.float64)
    native.call(
        function, a.theta, a.theta, a.pivots, products, workspace, replicas, size, count, *values
    )


# Parameters of a thread block of the CUDA kernels (csrc/cuda/projected_step.cu).
CUDA_BLOCK = 2048


def workspace_doubles(replicas: int, size: int, count: int) -> int:
    """Scratch memory for partial sums: `step_workspace` of csrc/cuda/projected_step.cu."""
    return replicas * max(1, 2 * count) * -(-size // CUDA_BLOCK)


def _new_products(a: SgdStep | AdamStep) -> Tensor:
    if a.theta.device.type != "cpu":  # the kernels write every entry, and a fill would be a launch
        return new_products(a)
    return torch.full((a.theta.shape[0], 2, a.pivots.shape[0]), torch.nan, dtype=torch.float64)
