"""Operations of every kernel family on small tensors, for `api_results.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import entropic_fast as ef
from entropic_fast.ops import (
    conv_example_grads,
    gram_update,
    langevin,
    norm_act_tangents,
    norm_example_grads,
    projected_step,
    random_bits,
)
from entropic_fast.ops.random_bits import streams

BACKENDS = ("reference", "cpp")


def draws(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_operations(dtype: torch.dtype) -> object:
    a, g = draws(3, 7, 7, 6, dtype=dtype), draws(3, 4, 7, 10, dtype=dtype)
    sizes = dict(stride=[2, 1], padding=[1, 2], dilation=[1, 2], groups=2)
    calls = (conv_example_grads.conv_weight_grads, conv_example_grads.conv_weight_norms)
    return [call(a, g, [3, 3], **sizes) for call in calls]


def norm_operations(dtype: torch.dtype) -> object:
    x, g = draws(3, 13, 7, dtype=dtype), draws(3, 13, 7, seed=2, dtype=dtype)
    mean, rstd, weight = draws(3, 7, seed=3, dtype=dtype).abs()
    affine = norm_example_grads.affine_grads(x, g, mean[None, None], rstd[None, None])
    return affine, norm_example_grads.batch_norm_backward(x, g, mean, rstd, weight)


def gram_operations(dtype: torch.dtype) -> object:
    rows, others = draws(7, 515, dtype=dtype), draws(5, 515, seed=2, dtype=dtype)
    results = [draws(7, 7), draws(7, 7), draws(7, 5), draws(7, 5)]
    for double, gram, cross in zip((False, True), results[:2], results[2:], strict=True):
        gram_update.symmetric_update_(gram, rows, double_products=double)
        gram_update.cross_update_(cross, rows, others, double_products=double)
    return results


def tangent_operations(dtype: torch.dtype) -> object:
    k, m, c = 3, 29, 7
    wide, other, third = (draws(k, m, c, seed=i, dtype=dtype) for i in (1, 2, 3))
    normal, slope, cotangent, bend = draws(4, m, c, seed=4, dtype=dtype)
    scale, rstd, shift = draws(3, c, seed=5, dtype=dtype).abs()
    tscale, tshift = draws(2, k, c, seed=6, dtype=dtype)
    common = dict(residual=third, slope=slope, normal=normal, scale=scale, tscale=tscale)
    common |= dict(cotangent=cotangent)
    return [
        norm_act_tangents.jvp(wide.clone(), other, tshift=tshift, bend=bend, **common),
        norm_act_tangents.vjp_tangent(wide.clone(), other, ty=third.flip(0), rstd=rstd, **common),
        norm_act_tangents.norm_act(normal, shift, rstd, scale, shift, slope, relu=True),
        norm_act_tangents.inner_products(wide, other),
    ]


def step_operations(dtype: torch.dtype) -> object:
    theta, grad, mean, square = draws(4, 3, 37, dtype=dtype)
    pivots = draws(5, 37, seed=2, dtype=dtype).cumsum(0)
    rates, square = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), square.abs()
    other, counts = theta.clone(), torch.arange(3)
    squares, between = projected_step.segment_squares(pivots), projected_step.pivot_squares(pivots)
    options = dict(lr=rates, pivots=pivots, weight_decay=0.1)
    sums = projected_step.sgd_step(theta, grad, mean, momentum=0.9, nesterov=True, **options)
    moved = theta.clone()
    placed = projected_step.project_step(theta, sums.clone(), pivots, squares)
    adam = projected_step.adam_step(other, grad, mean, square, counts, **options)
    return sums, moved, theta, placed, adam, other, square, counts, between


def langevin_operations(dtype: torch.dtype) -> object:
    x, v = 0.6 + 0.1 * draws(33, 2, dtype=dtype), draws(33, 2, seed=2, dtype=dtype)
    settings = dict(scheme="baoab", temperature=0.3, dt=0.01, steps=7, first_step=3, seed=5)
    langevin.langevin_steps(x, v, potential="ring", parameters=(7.0, 0.6, 3), **settings)
    words = streams.words(20, 3).view(10, 2)
    return x, v, langevin.box_muller(words, dtype)


def random_operations(dtype: torch.dtype) -> object:
    seeds, counters = torch.tensor([0, 2**40 + 1, -1]), torch.arange(15).view(3, 5) * 2**35
    kinds = {"words": torch.int64, "uniform": dtype, "signs": dtype, "sort_keys": torch.int64}
    filled = [
        random_bits.fill_(torch.empty(2, 3, 9, dtype=kept), seeds, kind=kind, start=2**34 + 3)
        for kind, kept in kinds.items()
    ]
    return filled, random_bits.philox(counters, seeds, seeds)


OPERATIONS: dict[str, Callable[[torch.dtype], object]] = {
    "convolution": conv_operations,
    "normalization": norm_operations,
    "gram": gram_operations,
    "tangents": tangent_operations,
    "projected step": step_operations,
    "langevin": langevin_operations,
    "random bits": random_operations,
}


def operation_results() -> Iterator[tuple[str, object]]:
    """Name and results of each family on each backend of the CPU, in both dtypes."""
    for backend, (family, operations) in product(BACKENDS, OPERATIONS.items()):
        ef.set_backend(backend)
        results = [operations(dtype) for dtype in (torch.float64, torch.float32)]
        ef.set_backend(None)
        yield f"operations {family}, {backend}", results
