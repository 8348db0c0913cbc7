"""Fused projection step in plain PyTorch: the arithmetic of `torch.optim`, then the products."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep


def sgd_step(a: SgdStep) -> Tensor:  # [R, 2, M]
    theta = a.theta
    direction = a.grad + a.weight_decay * theta
    if a.momentum != 0:
        if a.first:
            a.momentum_buffer.copy_(direction)
        else:
            a.momentum_buffer.mul_(a.momentum).add_(direction, alpha=1 - a.dampening)
        velocity = a.momentum_buffer
        direction = direction + a.momentum * velocity if a.nesterov else velocity
    theta -= a.lr.to(theta.dtype)[:, None] * direction
    return products(theta, a.pivots)


def adam_step(a: AdamStep) -> Tensor:  # [R, 2, M]
    theta, grad, dtype = a.theta, a.grad, a.theta.dtype
    count = a.step.to(torch.float64)
    step_size = a.lr / (1 - a.beta1**count)
    root_correction2 = (1 - a.beta2**count).sqrt()
    if a.decoupled:
        theta *= (1 - a.lr * a.weight_decay).to(dtype)[:, None]
    else:
        grad = grad + a.weight_decay * theta
    a.exp_avg.lerp_(grad, 1 - a.beta1)
    a.exp_avg_sq.mul_(a.beta2).addcmul_(grad, grad, value=1 - a.beta2)
    denominator = a.exp_avg_sq.sqrt() / root_correction2.to(dtype)[:, None] + a.eps
    theta -= step_size.to(dtype)[:, None] * (a.exp_avg / denominator)
    return products(theta, a.pivots)


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


def project_step(a: ProjectStep) -> tuple[Tensor, Tensor, Tensor]:  # segment, t, distance: [R]
    products, pivots, lengths = a.products, a.pivots, a.segment_squares
    here, following, along = products[:, 0, :-1], products[:, 0, 1:], products[:, 1, :-1]
    inside = along / lengths.where(lengths > 0, 1.0)
    t = inside.clamp(0, 1).where(lengths > 0, 0.0)
    squared = (here - along * inside).clamp(min=0)
    squared = torch.where(t == 0, here, torch.where(t == 1, following, squared))
    finite = products.isfinite().all(2).all(1) & lengths.isfinite().all()  # [R]
    # argmin returns the first of equal minima: the lowest segment.
    segment = squared.argmin(1).where(finite, 0)
    t = t.gather(1, segment[:, None])[:, 0].where(finite, torch.nan)
    start, end = pivots[segment].double(), pivots[segment + 1].double()
    point = torch.where(t[:, None] == 1, end, start + t[:, None] * (end - start))
    distance = (a.theta.double() - point).square().sum(1).sqrt()
    a.theta.copy_(point)
    return segment, t, distance.where(finite, torch.nan)
