"""Arguments of family `conv_example_grads`, and what is required of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import describe, integer, invalid, shown
from entropic_fast.ops._checks import check_dtype, check_like, check_shape

SIZES = ("kernel", "stride", "padding", "dilation")


class ConvWeightGrads(NamedTuple):
    a: Tensor  # [n, D, H, W, C] float32 or float64, channels last
    g: Tensor  # [n, d, h, w, O]
    out: Tensor  # [n, O * prod(kernel) * C / groups], written
    kernel: Sequence[int]  # [3], as the next three
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class ConvWeightNorms(NamedTuple):
    a: Tensor  # [n, D, H, W, C] float32 or float64, channels last
    g: Tensor  # [n, d, h, w, O]
    kernel: Sequence[int]  # [3], as the next three
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def new_norms(c: ConvWeightNorms) -> Tensor:  # [n]
    return c.a.new_empty(c.a.shape[0], dtype=torch.float64)


def gradient_shape(c: ConvWeightGrads | ConvWeightNorms) -> tuple[int, int]:
    return c.a.shape[0], c.g.shape[-1] * prod(c.kernel) * (c.a.shape[-1] // c.groups)


def channels_are_last(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def check_norms(c: ConvWeightGrads | ConvWeightNorms) -> None:
    integer("groups", c.groups, 1)
    for name, tensor, channels in (("a", c.a, "C"), ("g", c.g, "O")):
        if tensor.dim() != 5:
            raise invalid(name, f"shape [n, depth, height, width, {channels}]", describe(tensor))
        check_dtype(name, tensor)
        if not channels_are_last(tensor):
            raise invalid(
                name,
                "channels last with stride 1",
                f"strides {tensor.stride()}",
                f"pass {name}.contiguous()",
            )
        if tensor.shape[-1] % c.groups:
            raise invalid(
                name, f"a number of channels that {c.groups} groups divide", str(tensor.shape[-1])
            )
    if c.g.shape[0] != c.a.shape[0]:
        raise invalid("g", f"{c.a.shape[0]} examples as a has", str(c.g.shape[0]))
    check_like("g", c.g, "a", c.a)
    sizes = zip(SIZES, (c.kernel, c.stride, c.padding, c.dilation), (1, 1, 0, 1), strict=True)
    for name, values, least in sizes:
        if len(values) != 3:
            raise invalid(name, "three numbers", shown(list(values)))
        for value in values:
            integer(name, value, least)


def check_grads(c: ConvWeightGrads) -> None:
    check_norms(c)
    rows, width = gradient_shape(c)
    check_shape("out", c.out, rows, width)
    check_like("out", c.out, "a", c.a)
    if (width > 1 and c.out.stride(1) != 1) or (rows > 1 and c.out.stride(0) < width):
        raise invalid("out", "rows that are contiguous and lie apart", f"strides {c.out.stride()}")
