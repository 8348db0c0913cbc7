"""One small call of every op, at odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.langevin.reference import Coefficients
from ..ops.projected_step import segment_squares
from ..ops.projected_step.reference import products

Arguments = tuple[Any, ...]
# Odd sizes; sizes of one; and sizes larger than one block of a kernel.
SIZES = ("odd", "one", "large")


class Draw:
    """Random tensors of one seed and dtype, on the CPU."""

    def __init__(self, size: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self._size = dtype, size
        self._generator = torch.Generator().manual_seed(seed)

    def size(self, odd: int, large: int) -> int:
        return {"odd": odd, "one": 1, "large": large}[self._size]

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(self.dtype)

    def gram(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns).double()

    def positive(self, *shape: int) -> Tensor:
        return self(*shape).abs() + 0.5


class Sample(NamedTuple):
    """A call of an op."""

    family: str  # whose backends run it
    arguments: Callable[[Draw], Arguments]  # draws them, as the op takes them


def _convolution(draw: Draw) -> tuple[Tensor, Tensor, list[list[int]], int]:
    """Two groups, a stride, a dilation; one leading dimension of one."""
    n, c, o, side = draw.size(3, 5), 2 * draw.size(3, 9), 2 * draw.size(5, 17), draw.size(7, 9)
    kernel, stride, padding, dilation = [1, 3, 3], [1, 2, 1], [0, 1, 2], [1, 1, 2]
    ends = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((1, side, side), kernel, stride, padding, dilation, strict=True)
    ]
    sizes = [kernel, stride, padding, dilation]
    return draw(n, 1, side, side, c), draw(n, *ends, o), sizes, 2


def _conv_grads(draw: Draw) -> Arguments:
    a, g, sizes, groups = _convolution(draw)
    width = g.shape[-1] * math.prod(sizes[0]) * a.shape[-1] // groups
    return (a, g, torch.full((len(a), width), math.nan, dtype=draw.dtype), *sizes, groups)


def _conv_norms(draw: Draw) -> Arguments:
    a, g, sizes, groups = _convolution(draw)
    return (a, g, *sizes, groups)


def _symmetric(draw: Draw) -> Arguments:
    rows = draw(draw.size(7, 65), draw.size(33, 515))
    return (draw.gram(len(rows), len(rows)), rows, True)


def _cross(draw: Draw) -> Arguments:
    a, b, columns = draw.size(7, 65), draw.size(5, 33), draw.size(33, 515)
    return (draw.gram(a, b), draw(a, columns), draw(b, columns), True)


def _affine(draw: Draw) -> Arguments:
    n, s, c = draw.size(3, 5), draw.size(13, 65), draw.size(7, 65)
    return (draw(n, s, c), draw(n, s, c), draw(1, 1, c), draw.positive(1, 1, c))


def _batch_norm(draw: Draw) -> Arguments:
    n, s, c = draw.size(3, 5), draw.size(13, 65), draw.size(7, 65)
    return (draw(n, s, c), draw(n, s, c), draw(c), draw.positive(c), draw(c))


def _tangent_sizes(draw: Draw) -> tuple[int, int, int]:
    return draw.size(3, 5), draw.size(29, 513), draw.size(7, 33)


def _jvp(draw: Draw) -> Arguments:
    k, m, c = _tangent_sizes(draw)
    return (
        draw(k, m, c), draw(k, m, c), draw(m, c), draw(c), draw(k, c), draw(k, c),
        draw(k, m, c), draw(m, c), draw(m, c), draw(m, c), draw(k, m, c),
    )  # fmt: skip


def _vjp_tangent(draw: Draw) -> Arguments:
    k, m, c = _tangent_sizes(draw)
    return (
        draw(k, m, c), draw(k, m, c), draw(k, m, c), draw(m, c), draw(m, c), draw(c),
        draw(k, c), draw(m, c), draw(k, m, c), draw(c), draw(k, m, c),
    )  # fmt: skip


def _norm_act(draw: Draw) -> Arguments:
    _, m, c = _tangent_sizes(draw)
    return (draw(m, c), draw(c), draw.positive(c), draw(c), draw(c), draw(m, c), True)


def _inner_products(draw: Draw) -> Arguments:
    k, m, c = _tangent_sizes(draw)
    return (draw(k, m, c), draw(k, m, c))


def _rows(draw: Draw) -> tuple[Tensor, Tensor]:
    """Normalized rows, and 1 / standard deviation of each."""
    m, d = draw.size(7, 67), draw.size(5, 193)
    return draw(m, d), draw.positive(m)


def _row_jvp(draw: Draw) -> Arguments:
    (normal, rstd), k = _rows(draw), draw.size(3, 5)
    m, d = normal.shape
    weights = (draw(d), draw(k, d), draw(k, d))
    return (draw(k, m, d), normal, rstd, *weights, draw(m, d), True)


def _row_vjp_tangent(draw: Draw) -> Arguments:
    (normal, rstd), k = _rows(draw), draw.size(3, 5)
    m, d = normal.shape
    tangents = (draw(k, m, d), draw(k, m, d))
    return (normal, rstd, *tangents, draw(d), draw(k, d), draw(m, d), True, True)


def _path(draw: Draw) -> tuple[int, int, Tensor]:
    replicas, size = draw.size(3, 2), draw.size(37, 4099)
    return replicas, size, draw(draw.size(5, 3) + 1, size).cumsum(0)


def _sgd(draw: Draw) -> Arguments:
    r, p, pivots = _path(draw)
    rates = draw.positive(r).double()
    return (draw(r, p), draw(r, p), draw(r, p), rates, pivots, 0.9, 0.0, 0.1, True, False)


def _adam(draw: Draw) -> Arguments:
    r, p, pivots = _path(draw)
    rates, steps = draw.positive(r).double(), torch.arange(1, r + 1)
    moments = (draw(r, p), draw.positive(r, p))
    return (
        draw(r, p), draw(r, p), *moments, steps, rates, pivots, 0.9, 0.999, 1e-8, 0.1, False,
    )  # fmt: skip


def _project(draw: Draw) -> Arguments:
    r, p, pivots = _path(draw)
    theta = draw(r, p) + pivots[len(pivots) // 2]
    known = products(theta.double(), pivots.double())
    return (theta, known, pivots, segment_squares(pivots))


def _langevin(draw: Draw) -> Arguments:
    x = 0.6 + 0.1 * draw(draw.size(33, 513), 2)
    c = Coefficients.of("baoab", 0.3, 0.01, 1.0)
    ring = (7.0, 0.6, 3.0)
    return (x, draw(*x.shape), "ring", ring, "baoab", c.drift, c.decay, c.noise, 3, 5, 7, 11, "")


def _words(draw: Draw) -> Arguments:
    count = draw.size(33, 513)
    words = torch.randint(0, 2**32, (count, 2), generator=torch.Generator().manual_seed(count))
    return (words, draw.dtype, "")


def _fill(draw: Draw) -> Arguments:
    """Signs by columns, from three seeds, a late stream and number."""
    columns = draw(draw.size(33, 1031), draw.size(2, 9), 3)
    seeds = torch.tensor([0, 2**40 + 1, -1])
    return (columns.permute(1, 2, 0), seeds, 0, 2**33 + 1, 2**34 + 3, "signs", "")


def _philox(draw: Draw) -> Arguments:
    rows, count = draw.size(3, 5), draw.size(33, 515)
    counters = torch.arange(rows * count).view(rows, count) * (2**35 + 1)
    return (counters, torch.arange(rows) - 1, torch.arange(rows) * 2**33, "")


SAMPLES: dict[str, Sample] = {
    "conv_weight_grads": Sample("conv_example_grads", _conv_grads),
    "conv_weight_norms": Sample("conv_example_grads", _conv_norms),
    "gram_symmetric_update_": Sample("gram_update", _symmetric),
    "gram_cross_update_": Sample("gram_update", _cross),
    "norm_affine_grads": Sample("norm_example_grads", _affine),
    "norm_batch_norm_backward": Sample("norm_example_grads", _batch_norm),
    "norm_act_jvp": Sample("norm_act_tangents", _jvp),
    "norm_act_vjp_tangent": Sample("norm_act_tangents", _vjp_tangent),
    "norm_act": Sample("norm_act_tangents", _norm_act),
    "norm_act_inner_products": Sample("norm_act_tangents", _inner_products),
    "row_norm_jvp": Sample("row_norm_tangents", _row_jvp),
    "row_norm_vjp_tangent": Sample("row_norm_tangents", _row_vjp_tangent),
    "sgd_step": Sample("projected_step", _sgd),
    "adam_step": Sample("projected_step", _adam),
    "project_step": Sample("projected_step", _project),
    "langevin_steps": Sample("langevin", _langevin),
    "langevin_box_muller": Sample("langevin", _words),
    "random_fill": Sample("random_bits", _fill),
    "random_philox": Sample("random_bits", _philox),
}
