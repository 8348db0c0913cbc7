"""Pieces of random networks on images [C, *S] with one to three sizes S."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from random_pieces import (
    Apply,
    Draw,
    Made,
    Shape,
    activation,
    layer_norm,
    random_statistics,
    raw_scale,
    without_grad,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _groups(draw: Draw, channels: int) -> int:
    kind = draw.one("dense", "dense", "grouped", "depthwise")
    divisors = [g for g in range(2, channels) if channels % g == 0]
    if kind == "depthwise" and channels > 1:
        draw.note("depthwise")
        return channels
    if kind == "grouped" and divisors:
        draw.note("grouped")
        return draw.one(*divisors)
    return 1


def conv(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    axes = len(sizes)
    groups = _groups(draw, channels)
    out = groups * draw.whole(1, max(1, 6 // groups))
    dilation = [draw.one(1, 1, 2) for _ in sizes]
    kernel = [draw.whole(1, 3) for _ in sizes]
    span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    stride = [draw.whole(1, 3) for _ in sizes]
    mode = draw.one("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    padding: Any = draw.one("numbers", "numbers", "same", "valid")
    before: list[int] = []
    if padding == "same":
        stride = [1] * axes
        if any(s % 2 for s in span):
            draw.note("same, uneven")
        if mode != "zeros" and any(s // 2 + 1 >= n for s, n in zip(span, sizes, strict=True)):
            mode = "zeros"
        after = list(sizes)
    else:
        pads = [0] * axes
        if padding == "numbers":
            pads = padding = [draw.whole(0, min(2, s - 1)) for s in sizes]
            if draw.chance(0.2):  # more in front than behind
                before = [draw.whole(0, 2) for _ in sizes]
        grown = [n + sum(before[i : i + 1]) for i, n in enumerate(sizes)]
        fits = zip(span, grown, pads, strict=True)
        if any(s >= n + 2 * p for s, n, p in fits):
            kernel, span = [1] * axes, [0] * axes
        after = [
            (n + 2 * p - s - 1) // t + 1
            for n, p, s, t in zip(grown, pads, span, stride, strict=True)
        ]
    draw.note(f"Conv{axes}d", f"padding {padding if isinstance(padding, str) else 'by numbers'}")
    if max(stride) > 1:
        draw.note("strided")
    if max(dilation) > 1 and max(kernel) > 1:
        draw.note("dilated")
    if any(t > k for t, k in zip(stride, kernel, strict=True)):
        draw.note("stride over kernel")
    if mode != "zeros":
        draw.note(mode)
    bias = draw.chance(0.6)
    layer: nn.Module = CONV[axes](
        channels, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    )
    if draw.chance(0.1):
        draw.note("weight norm")
        layer = parametrizations.weight_norm(layer)
    if before:
        draw.note("padding in front only")
        pad = [p for n in reversed(before) for p in (n, 0)]
        layer = Apply(lambda m, x: m[0](F.pad(x, pad)), layer)
    return layer, (out, *after)


def transposed(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    groups = _groups(draw, channels)
    out = groups * draw.whole(1, max(1, 4 // groups))
    kernel = [draw.whole(1, 3) for _ in sizes]
    most = 2 if prod(sizes) < 40 else 1
    stride = [draw.whole(1, most) for _ in sizes]
    dilation = [draw.one(1, 1, 2) for _ in sizes]
    pairs = list(zip(stride, dilation, strict=True))
    extra = [draw.whole(0, max(t, d) - 1) for t, d in pairs]
    padding = [draw.whole(0, 1) for _ in sizes]
    rows = zip(sizes, stride, padding, dilation, kernel, extra, strict=True)
    after = [(n - 1) * t - 2 * p + d * (k - 1) + e + 1 for n, t, p, d, k, e in rows]
    if min(after) < 1:
        after = [a + 2 * p for a, p in zip(after, padding, strict=True)]
        padding = [0] * len(sizes)
    draw.note(f"ConvTranspose{len(sizes)}d")
    if any(extra):
        draw.note("output padding")
    if groups > 1:
        draw.note("grouped transposed")
    layer = TRANSPOSED[len(sizes)](
        channels, out, kernel, stride, padding, extra, groups, draw.chance(0.6), dilation
    )
    return layer, (out, *after)


def image_norm(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    axes, affine = len(sizes), draw.chance(0.75)
    kind = draw.one("BatchNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "channels", "whole")
    if kind == "whole":
        return layer_norm(draw, shape)
    if kind == "channels" and channels >= 4:
        draw.note("LayerNorm over channels")
        norm = nn.LayerNorm(channels)
        return Apply(lambda m, x: m[0](x.movedim(1, -1)).movedim(-1, 1), norm), shape
    if kind == "GroupNorm" and channels * prod(sizes) >= 4:
        groups = [
            g for g in range(1, channels + 1) if channels % g == 0 and shape_over(shape, g) >= 4
        ]
        draw.note("GroupNorm" if affine else "GroupNorm without weight")
        return nn.GroupNorm(draw.one(*groups), channels, affine=affine), shape
    if kind == "InstanceNorm":
        running = prod(sizes) < 4 or draw.chance(0.4)
        draw.note("InstanceNorm, running" if running else "InstanceNorm")
        if affine:
            draw.note("InstanceNorm with weight")
        norm = INSTANCE_NORM[axes](channels, affine=affine, track_running_stats=running)
        return random_statistics(draw, norm), shape
    draw.note(f"BatchNorm{axes}d" if affine else "BatchNorm without weight")
    return random_statistics(draw, BATCH_NORM[axes](channels, affine=affine)), shape


def shape_over(shape: Shape, groups: int) -> int:
    return prod(shape) // groups


def pool(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    if min(sizes) < 2:
        return activation(draw, shape)
    axes = len(sizes)
    if draw.chance(0.5):
        layer = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[axes](2)
    else:
        layer = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[axes](2)
    return layer, (channels, *(s // 2 for s in sizes))


def functional_conv(draw: Draw, shape: Shape) -> Made:
    channels, *sizes = shape
    out, call = draw.whole(1, 5), CONV_FUNCTION[len(sizes)]
    size = (out, channels, *[3] * len(sizes))
    uses: dict[str, tuple[Callable[[Any, Tensor], Tensor], Shape]] = {
        "F.conv": (lambda m, x: call(x, m.w, m.b, padding=1), size),
        "F.conv by keyword": (lambda m, x: call(weight=m.w, padding=1, input=x, bias=m.b), size),
        "F.conv of an expression": (lambda m, x: call(x, m.w * 2, m.b, padding=1), size),
        "F.conv of standardized weights": (
            lambda m, x: call(x, m.w - m.w.mean(1, keepdim=True), m.b, padding=1),
            size,
        ),
        "F.conv of a matrix": (
            lambda m, x: call(x, m.w.view(*m.w.shape, *[1] * (x.ndim - 2)), m.b),
            (out, channels),
        ),
        "F.conv of a transpose": (
            lambda m, x: call(x, m.w.transpose(0, 1), m.b, padding=1),
            (channels, out, *size[2:]),
        ),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    function, size = uses[kind]
    return Apply(function, w=torch.randn(size) / 3, b=torch.randn(out)), (out, *sizes)


def shared_conv(draw: Draw, shape: Shape) -> Made:
    """Convolutions that share parameters; all [C, *S] -> [C, *S]."""
    channels, *sizes = shape
    axes = len(sizes)
    build = CONV[axes]
    first, second = (build(channels, channels, 3, padding=p, dilation=p) for p in (1, 2))
    norm = random_statistics(draw, BATCH_NORM[axes](channels))
    tanh = torch.tanh
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "conv twice": lambda m, x: m[0](tanh(m[0](x))),
        "conv weight tied": lambda m, x: m[1](tanh(m[0](x))),
        "conv bias shared": lambda m, x: m[1](tanh(m[0](x))),
        "conv and its transpose": lambda m, x: m[1](tanh(m[0](x))),
        "conv weight in a raw expression": lambda m, x: m[0](x) * m[0].weight.square().mean(),
        "batch norm twice": lambda m, x: m[2](tanh(m[2](m[0](x)))),
        "conv on two scales": lambda m, x: m[0](x) + m[0](x * 2 + 1).mean((-1,), keepdim=True),
        "conv output discarded": lambda m, x: (m[0](x), m[1](x))[1],
        "conv of one example at a time": lambda m, x: torch.stack([m[0](one) for one in x]),
        "conv of views beside the examples": lambda m, x: sum(
            m[0](torch.cat([x, x.sin()])).chunk(2)
        ),
        "conv, examples reversed": lambda m, x: m[0](x.flip(0)).flip(0),
        "conv of a constant": lambda m, x: m[0](x) + m[1](torch.ones_like(x[:1])),
        "conv output overwritten": lambda m, x: torch.relu_(m[0](x).mul_(2)),
        "conv under no_grad too": lambda m, x: m[0](x) + without_grad(m[0], tanh(x)),
    }
    kind = draw.one(*uses)
    draw.note(kind)
    if kind == "conv and its transpose":
        second = TRANSPOSED[axes](channels, channels, 3, padding=1)
    if kind in ("conv weight tied", "conv and its transpose"):
        second.weight = first.weight
    elif kind == "conv bias shared":
        second.bias = first.bias
    return Apply(uses[kind], first, second, norm), shape


def folded_conv(draw: Draw, shape: Shape) -> Made:
    """A convolution with the first size, or the channels, folded into the examples' axis."""
    channels, *sizes = shape
    out = draw.whole(1, 4)
    if len(sizes) > 1 and draw.chance(0.6):
        draw.note("frames folded into the examples")
        depth, rest = draw_fold(draw, sizes)
        layer: nn.Module = CONV[len(rest)](channels, out, 3, padding=1)
        if draw.chance(0.5):
            layer = nn.Sequential(layer, random_statistics(draw, BATCH_NORM[len(rest)](out)))

        def fold(m: Any, x: Tensor) -> Tensor:
            frames = x.movedim(2, 1).reshape(-1, channels, *rest)
            return m[0](frames).view(-1, depth, out, *rest).movedim(1, 2)

        return Apply(fold, layer), (out, *sizes)
    draw.note("channels folded into the examples")
    draw.fold = channels
    layer = CONV[len(sizes)](1, out, 3, padding=1)
    return (
        Apply(
            lambda m, x: (
                m[0](x.reshape(-1, 1, *sizes))
                .view(-1, channels, out, *sizes)
                .reshape(-1, channels * out, *sizes)
            ),
            layer,
        ),
        (channels * out, *sizes),
    )


def draw_fold(draw: Draw, sizes: list[int]) -> tuple[int, list[int]]:
    draw.fold = sizes[0]
    return sizes[0], sizes[1:]


IMAGE = [
    *[conv, image_norm] * 4, transposed, transposed, transposed, activation, activation,
    raw_scale, pool, functional_conv, functional_conv, *[shared_conv] * 4, folded_conv,
]  # fmt: skip
