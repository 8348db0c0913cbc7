"""Family `projected_step` in Triton: float32 and float64 on a GPU, or under Triton's interpreter.

One program owns BLOCK elements of one replica, advances them and keeps them while it reads each
pivot once; a second kernel sums over blocks in a fixed order. Hyper-parameters other than the
learning rate are compile-time constants, as Triton rounds run-time arguments to float32. The number
of pivots is known at run time only: one compilation for every path.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropic_fast.ops._triton import FUSE, count, on_device
from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep, new_positions

BLOCK = 1024
SUM_BLOCK = 256
# Of updates and moves. Not timed on a GPU: by ptxas for sm_90, SGD with momentum in float32 needs
# 48 registers at 8 warps where P is not a multiple of 16 (ResNet-20), 106 at 4: five blocks and 40
# warps on a multiprocessor in place of four and 16. Where it is, 40 and 72: six and 48, for seven
# and 28.
WARPS = 8


@triton.jit
def store_products(
    theta, offset, mask, pivots, partial, r, block, size, block_count, pivot_count
):  # fmt: skip
    """partial[r, :, :, block] from this program's elements of theta and of every pivot."""
    here = theta.to(tl.float64)
    p = tl.load(pivots + offset, mask=mask, other=0.0).to(tl.float64)
    for m in count(0, pivot_count):
        following = tl.minimum(m + 1, pivot_count - 1)  # the last pivot follows itself
        after = tl.load(pivots + following * size + offset, mask=mask, other=0.0).to(tl.float64)
        delta = tl.where(mask, here - p, 0.0)
        square = tl.sum(delta * delta, axis=0)
        along = tl.where(following > m, tl.sum(delta * (after - p), axis=0), 0.0)
        row = (r * 2 * pivot_count + m) * block_count + block
        tl.store(partial + row, square)
        tl.store(partial + row + pivot_count * block_count, along)
        p = after


@triton.jit(do_not_specialize=["pivot_count"])
def sgd_kernel(
    theta, grad, buffer, lr, pivots, partial,
    replicas, size, block_count, pivot_count, PIVOTS: tl.constexpr,
    MOMENTUM: tl.constexpr, TAKE: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    size = tl.cast(size, tl.int64)
    block_count = tl.cast(block_count, tl.int64)
    # Replicas innermost: a block of a pivot, once in L2, serves all of them.
    r = program % replicas
    block = program // replicas
    offset = block * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    at = r * size + offset
    x = tl.load(theta + at, mask=mask, other=0.0)
    direction = tl.load(grad + at, mask=mask, other=0.0) + WEIGHT_DECAY * x
    if MOMENTUM != 0.0:
        if FIRST:
            velocity = direction
        else:
            velocity = tl.load(buffer + at, mask=mask, other=0.0) * MOMENTUM + TAKE * direction
        tl.store(buffer + at, velocity, mask=mask)
        if NESTEROV:
            direction = direction + MOMENTUM * velocity
        else:
            direction = velocity
    x = x - tl.load(lr + r).to(x.dtype) * direction
    tl.store(theta + at, x, mask=mask)
    if PIVOTS:
        store_products(x, offset, mask, pivots, partial, r, block, size, block_count, pivot_count)


@triton.jit(do_not_specialize=["pivot_count"])
def adam_kernel(
    theta, grad, exp_avg, exp_avg_sq, step, lr, pivots, partial,
    replicas, size, block_count, pivot_count, PIVOTS: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, BETA2: tl.constexpr,
    TAKE1: tl.constexpr, TAKE2: tl.constexpr, EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr, DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    size = tl.cast(size, tl.int64)
    block_count = tl.cast(block_count, tl.int64)
    r = program % replicas
    block = program // replicas
    offset = block * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    at = r * size + offset
    rate = tl.load(lr + r)
    updates = tl.load(step + r).to(tl.float64)
    step_size = (rate / (1.0 - tl.exp(updates * LOG_BETA1))).to(theta.dtype.element_ty)
    root_correction2 = tl.sqrt(1.0 - tl.exp(updates * LOG_BETA2)).to(theta.dtype.element_ty)
    x = tl.load(theta + at, mask=mask, other=0.0)
    gradient = tl.load(grad + at, mask=mask, other=0.0)
    if DECOUPLED:
        x = x * (1.0 - rate * WEIGHT_DECAY).to(x.dtype)
    else:
        gradient = gradient + WEIGHT_DECAY * x
    mean = tl.load(exp_avg + at, mask=mask, other=0.0)
    mean = mean + TAKE1 * (gradient - mean)
    square = tl.load(exp_avg_sq + at, mask=mask, other=0.0) * BETA2 + TAKE2 * gradient * gradient
    tl.store(exp_avg + at, mean, mask=mask)
    tl.store(exp_avg_sq + at, square, mask=mask)
    denominator = tl.sqrt(square) / root_correction2 + EPS
    # Past the end every state is 0 and eps may be 0 too.
    x = x - tl.where(mask, step_size * (mean / tl.where(mask, denominator, 1.0)), 0.0)
    tl.store(theta + at, x, mask=mask)
    if PIVOTS:
        store_products(x, offset, mask, pivots, partial, r, block, size, block_count, pivot_count)


@triton.jit
def sum_kernel(partial, sums, block_count, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    """sums[row] = sum of partial[row, :block_count], or its square root."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in count(0, block_count, BLOCK):
        at = start + lanes
        total += tl.load(partial + row * block_count + at, mask=at < block_count, other=0.0)
    value = tl.sum(total, axis=0)
    if ROOT:
        value = tl.sqrt(value)
    tl.store(sums + row, value)


@triton.jit
def choose_kernel(
    products, segment_squares, segment, position, pivot_count, BLOCK: tl.constexpr
):  # fmt: skip
    """Per replica the lowest among the nearest segments; NaN when any product is not finite."""
    r = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < pivot_count - 1
    row = products + r * 2 * pivot_count + index
    here = tl.load(row, mask=mask, other=0.0)
    following = tl.load(row + 1, mask=mask, other=0.0)
    along = tl.load(row + pivot_count, mask=mask, other=0.0)
    length = tl.load(segment_squares + index, mask=mask, other=0.0)
    # x - x is 0 for a finite x and NaN otherwise.
    poison = (here - here) + (following - following) + (along - along) + (length - length)
    inside = (along > 0) & (length > 0)
    t = tl.where(inside, along / tl.where(inside, length, 1.0), 0.0)
    end = inside & (along >= length)
    t = tl.where(end, 1.0, t)
    between = here - along * t
    between = tl.where(between > 0, between, 0.0)
    squared = tl.where(end, following, tl.where(inside, between, here))
    squared = tl.where(mask, squared, float("inf"))
    finite = tl.sum(poison, axis=0) == 0
    best = tl.where(finite, tl.argmin(squared, axis=0), 0)
    chosen = tl.sum(tl.where(index == best, t, 0.0), axis=0)
    tl.store(segment + r, best.to(tl.int64))
    tl.store(position + r, tl.where(finite, chosen, float("nan")))


@triton.jit
def move_kernel(
    theta, pivots, segment, position, partial, replicas, size, block_count, BLOCK: tl.constexpr
):  # fmt: skip
    """theta <- p + t (p' - p); partial[r, block] = squared distance moved."""
    program = tl.program_id(0).to(tl.int64)
    size = tl.cast(size, tl.int64)
    block_count = tl.cast(block_count, tl.int64)
    r = program % replicas
    block = program // replicas
    offset = block * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    t = tl.load(position + r)
    at = pivots + tl.load(segment + r) * size + offset
    start = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    end = tl.load(at + size, mask=mask, other=0.0).to(tl.float64)
    point = tl.where(t == 1.0, end, start + t * (end - start))
    x = tl.load(theta + r * size + offset, mask=mask, other=0.0)
    moved = tl.where(mask, x.to(tl.float64) - point, 0.0)
    tl.store(theta + r * size + offset, point.to(x.dtype), mask=mask)
    tl.store(partial + r * block_count + block, tl.sum(moved * moved, axis=0))


def _workspace(theta: Tensor, rows: int) -> tuple[Tensor, int]:
    block_count = triton.cdiv(theta.shape[1], BLOCK)
    shape = (theta.shape[0] * rows, block_count)
    return torch.empty(shape, dtype=torch.float64, device=theta.device), block_count


def _sum_rows(partial: Tensor, sums: Tensor, root: bool) -> None:
    if sums.numel() > 0:
        sum_kernel[(sums.numel(),)](
            partial, sums, partial.shape[1], ROOT=root, BLOCK=SUM_BLOCK, **FUSE
        )


def _update_and_products(kernel, theta: Tensor, pivots: Tensor, *state: Tensor, **constants):
    replicas, size = theta.shape
    pivot_count = pivots.shape[0]
    products = torch.empty((replicas, 2, pivot_count), dtype=torch.float64, device=theta.device)
    partial, block_count = _workspace(theta, 2 * pivot_count)
    with on_device(theta):
        if replicas * block_count > 0:
            kernel[(replicas * block_count,)](
                theta, *state, pivots, partial, replicas, size, block_count, pivot_count,
                PIVOTS=pivot_count > 0, **constants, BLOCK=BLOCK, num_warps=WARPS, **FUSE,
            )  # fmt: skip
        _sum_rows(partial, products, root=False)
    return products


def sgd_step(a: SgdStep) -> Tensor:
    products: Tensor = _update_and_products(
        sgd_kernel, a.theta, a.pivots, a.grad, a.momentum_buffer, a.lr,
        MOMENTUM=a.momentum, TAKE=1.0 - a.dampening, WEIGHT_DECAY=a.weight_decay,
        NESTEROV=a.nesterov, FIRST=a.first,
    )  # fmt: skip
    return products


def adam_step(a: AdamStep) -> Tensor:
    # beta = 0 has no logarithm; the smallest double behaves as 0 does.
    log_beta1, log_beta2 = (math.log(max(beta, 1e-300)) for beta in (a.beta1, a.beta2))
    products: Tensor = _update_and_products(
        adam_kernel, a.theta, a.pivots, a.grad, a.exp_avg, a.exp_avg_sq, a.step, a.lr,
        LOG_BETA1=log_beta1, LOG_BETA2=log_beta2, BETA2=a.beta2,
        TAKE1=1.0 - a.beta1, TAKE2=1.0 - a.beta2, EPS=a.eps,
        WEIGHT_DECAY=a.weight_decay, DECOUPLED=a.decoupled,
    )  # fmt: skip
    return products


def project_step(a: ProjectStep) -> tuple[Tensor, Tensor, Tensor]:
    theta, pivots = a.theta, a.pivots
    replicas, size = theta.shape
    pivot_count = pivots.shape[0]
    segment, t, distance = new_positions(a)
    partial, block_count = _workspace(theta, 1)
    with on_device(theta):
        if replicas > 0:
            choose_kernel[(replicas,)](
                a.products, a.segment_squares, segment, t, pivot_count,
                BLOCK=triton.next_power_of_2(pivot_count - 1), **FUSE,
            )  # fmt: skip
        if replicas * block_count > 0:
            move_kernel[(replicas * block_count,)](
                theta, pivots, segment, t, partial, replicas, size, block_count,
                BLOCK=BLOCK, num_warps=WARPS, **FUSE,
            )  # fmt: skip
        _sum_rows(partial, distance, root=True)
    if size == 0:  # nothing carried a NaN into the distance
        distance += t - t
    return segment, t, distance
