"""Fused projection step in plain PyTorch: the arithmetic of `torch.optim`, then the products.

Every function works in place on contiguous, checked tensors and runs on any device. Shapes as in
`entropic_fast.ops.projected_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sgd_step(
    theta: Tensor,  # [R, P], updated
    grad: Tensor,  # [R, P]
    momentum_buffer: Tensor,  # [R, P], updated; not touched when momentum is 0
    lr: Tensor,  # [R] float64
    pivots: Tensor,  # [M, P]
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> Tensor:  # [R, 2, M] float64
    direction = grad + weight_decay * theta
    if momentum != 0:
        if first:
            momentum_buffer.copy_(direction)
        else:
            momentum_buffer.mul_(momentum).add_(direction, alpha=1 - dampening)
        direction = direction + momentum * momentum_buffer if nesterov else momentum_buffer
    theta -= lr.to(theta.dtype)[:, None] * direction
    return products(theta, pivots)


def adam_step(
    theta: Tensor,  # [R, P], updated
    grad: Tensor,  # [R, P]
    exp_avg: Tensor,  # [R, P], updated
    exp_avg_sq: Tensor,  # [R, P], updated
    step: Tensor,  # [R] int64, already counting this step
    lr: Tensor,  # [R] float64
    pivots: Tensor,  # [M, P]
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:  # [R, 2, M] float64
    dtype = theta.dtype
    count = step.to(torch.float64)
    step_size = lr / (1 - beta1**count)
    root_correction2 = (1 - beta2**count).sqrt()
    if decoupled:
        theta *= (1 - lr * weight_decay).to(dtype)[:, None]
    else:
        grad = grad + weight_decay * theta
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / root_correction2.to(dtype)[:, None] + eps
    theta -= step_size.to(dtype)[:, None] * (exp_avg / denominator)
    return products(theta, pivots)


def products(
    theta: Tensor,  # [R, P]
    pivots: Tensor,  # [M, P]
) -> Tensor:  # [R, 2, M] float64
    """|theta - p_m|^2, and <theta - p_m, p_{m+1} - p_m> with 0 for the last pivot."""
    count = pivots.shape[0]
    out = torch.zeros(theta.shape[0], 2, count, dtype=torch.float64, device=theta.device)
    for m in range(count):
        here = pivots[m].double()
        delta = theta.double() - here
        out[:, 0, m] = delta.square().sum(1)
        if m + 1 < count:
            out[:, 1, m] = delta @ (pivots[m + 1].double() - here)
    return out


def project_step(
    theta: Tensor,  # [R, P], updated
    products: Tensor,  # [R, 2, M] float64
    pivots: Tensor,  # [M, P]
    segment_squares: Tensor,  # [M - 1] float64
) -> tuple[Tensor, Tensor, Tensor]:  # [R] int64, [R] float64, [R] float64
    here, following, along = products[:, 0, :-1], products[:, 0, 1:], products[:, 1, :-1]
    inside = along / segment_squares.where(segment_squares > 0, 1.0)
    t = inside.clamp(0, 1).where(segment_squares > 0, 0.0)
    squared = (here - along * inside).clamp(min=0)
    squared = torch.where(t == 0, here, torch.where(t == 1, following, squared))
    finite = products.isfinite().all(2).all(1) & segment_squares.isfinite().all()  # [R]
    # argmin returns the first of equal minima: the lowest segment.
    segment = squared.argmin(1).where(finite, 0)
    t = t.gather(1, segment[:, None])[:, 0].where(finite, torch.nan)
    start, end = pivots[segment].double(), pivots[segment + 1].double()
    point = torch.where(t[:, None] == 1, end, start + t[:, None] * (end - start))
    distance = (theta.double() - point).square().sum(1).sqrt()
    theta.copy_(point)
    return segment, t, distance.where(finite, torch.nan)
