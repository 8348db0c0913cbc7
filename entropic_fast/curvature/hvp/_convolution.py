"""Convolutions: tangents of the operation and of its backward pass, K directions per call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._torch.memory_format import overruns_channels_last
from ..._utils.devices import is_gpu
from ._jvp_rules import jvp_rule
from ._node import DeferredSum, NodeContext, flat
from ._patches import by_patches

aten = torch.ops.aten
# Most channels of one call on a CPU: wider ones gain nothing and fall out of the cache. On a GPU
# the number of launches decides, so all K weights go into one call.
CHANNELS = 512


@dataclass(frozen=True)
class Geometry:
    """The arguments of a convolution other than tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @staticmethod
    def of(ctx: NodeContext, first: int) -> Geometry:
        """From the arguments of an aten operation, starting at position `first`."""
        dims = ctx.value(1).ndim - 2
        a = [ctx.argument(first + i) for i in range(6)]
        stride, padding, dilation, extra = (_each(a[i], dims) for i in (0, 1, 2, 4))
        return Geometry(stride, padding, dilation, bool(a[3]), extra, int(a[5]))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = aten.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip
        return out

    # K weights that meet the same images are one convolution with K times the output channels, K
    # stacks of images that meet one weight one with K times the batch.
    def with_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [n, C, ...] with each of weights [K, *shape]: [K, n, O, ...], of any strides."""
        k, g = len(weights), self.groups
        if self.transposed:  # [K, C, O/g, ...]: output channels are the second axis
            stacked = weights.movedim(0, 1)  # [C, K, O/g, ...]
            stacked = stacked.reshape(len(stacked), -1, *weights.shape[3:])
        else:  # [K, O, C/g, ...]: the first, by groups
            stacked = weights.unflatten(1, (g, -1)).movedim(0, 1)  # [g, K, O/g, C/g, ...]
            stacked = stacked.reshape(-1, *weights.shape[2:])
        out = self(x, stacked)  # [n, g K O/g, ...]
        return out.unflatten(1, (g, k, -1)).movedim(2, 0).flatten(2, 3)


def _each(values: Sequence[int], dims: int) -> tuple[int, ...]:
    return tuple(values) * dims if len(values) == 1 else tuple(values)


@jvp_rule(aten.convolution.default)
def _convolution(ctx: NodeContext) -> Any:
    geometry = Geometry.of(ctx, 3)
    tx, tw, tb = (ctx.tangent(i) for i in range(3))
    patches = by_patches(ctx, 0, 1, geometry)
    out = None if patches is None else patches.jvp(tx, tw)
    if patches is not None:
        tx = tw = None
    if tx is not None:
        out = geometry(packed(flat(tx)), ctx.value(1)).unflatten(0, (len(tx), -1))
    if tw is not None:
        out = _with_weights(geometry, ctx.value(0), tw, ctx.shape[1], out)
    if tb is not None:
        # The bias is added to every position: its tangent broadcasts.
        tb = tb.view(len(tb), 1, -1, *[1] * (len(ctx.shape) - 2))
        if out is None:
            return tb.expand(len(tb), *ctx.shape)
        out = (out.total() if isinstance(out, DeferredSum) else out).add_(tb)
    return out


def _with_weights(
    geometry: Geometry | InputGradient,
    x: Tensor,
    weights: Tensor,
    channels: int,
    added: Tensor | None,
) -> Any:
    """x with each of weights [K, ...], plus a tangent [K, n, channels, ...] if one is given."""
    blocks = _blocks(weights, channels)
    # A fused region adds the two terms while it reads them, which saves a pass over memory.
    if added is not None and len(blocks) == 1:
        return DeferredSum(added, geometry.with_weights(x, weights))
    out = added
    for rows in blocks:
        product = geometry.with_weights(x, weights[rows])
        if out is None:
            out = _empty(product, len(weights) * product.shape[1], *product.shape[2:])
            out = out.unflatten(0, (len(weights), -1))
        if added is None:
            out[rows].copy_(product)
        else:
            out[rows].add_(product)
    return out


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Memory of a shape, with channels last for images."""
    memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory)


def _blocks(weights: Tensor, channels: int) -> list[slice]:
    if is_gpu(weights.device):
        return [slice(0, len(weights))]
    count = max(1, CHANNELS // max(1, channels))
    return [slice(i, i + count) for i in range(0, len(weights), count)]


def packed(images: Tensor) -> Tensor:
    """Images [N, C, H, W] with channels last."""
    # oneDNN's float32 convolutions are up to twice as fast with channels last.
    if images.ndim == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous()


class InputGradient:
    """The map from cotangents g [n, O, ...] to cotangents of the input x [n, C, ...]."""

    def __init__(self, geometry: Geometry, g: Tensor, x: Tensor, kernel: Sequence[int]) -> None:
        self._size = x.shape[2:]
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
        fits = all(p <= r for p, r in zip(geometry.padding, reach, strict=True))
        plain = not geometry.transposed and geometry.groups == 1 and set(geometry.stride) <= {1}
        # With stride 1 it is an ordinary convolution with flipped weights, which CPU libraries
        # compute faster. cuDNN has kernels for the transposed one, and flipping takes launches.
        self._flips_weights = plain and fits and not is_gpu(g.device)
        if self._flips_weights:
            padding = tuple(r - p for r, p in zip(reach, geometry.padding, strict=True))
            self._geometry = replace(geometry, padding=padding)
            return
        # The gradient of a transposed convolution is an ordinary one.
        if geometry.transposed:
            none = (0,) * len(geometry.stride)
            self._geometry = replace(geometry, transposed=False, output_padding=none)
            return
        # With a stride several input sizes have one output size: output padding restores that of x.
        extra = []
        for i, (s, p, d) in enumerate(
            zip(geometry.stride, geometry.padding, geometry.dilation, strict=True)
        ):
            least = (g.shape[2 + i] - 1) * s - 2 * p + d * (kernel[i] - 1) + 1
            extra.append(x.shape[2 + i] - least)
        self._geometry = replace(geometry, transposed=True, output_padding=tuple(extra))

    def __call__(self, g: Tensor, weight: Tensor) -> Tensor:
        if self._flips_weights:
            weight = weight.transpose(0, 1).flip(list(range(2, weight.ndim)))
        return self._cropped(self._geometry(g, weight))

    def with_weights(self, g: Tensor, weights: Tensor) -> Tensor:
        """As `Geometry.with_weights`."""
        if self._flips_weights:
            weights = weights.transpose(1, 2).flip(list(range(3, weights.ndim)))
        return self._cropped(self._geometry.with_weights(g, weights))

    def _cropped(self, out: Tensor) -> Tensor:
        # Output padding of the stride or more leaves positions that no input contributed to.
        for i, size in enumerate(self._size):
            out = out.narrow(i - len(self._size), 0, size)
        return out


@jvp_rule(aten.convolution_backward.default)
def _convolution_backward(ctx: NodeContext) -> Any:
    geometry = Geometry.of(ctx, 4)
    tg, tx, tw = (ctx.tangent(i) for i in range(3))
    wants = ctx.argument(10)
    k = len(next(t for t in (tg, tx, tw) if t is not None))
    gx = gw = gb = None
    if tg is not None:
        # Once, for both gradients that read it.
        tg = packed(flat(tg)).unflatten(0, (k, -1))
    if wants[0]:
        gx = _to_input(ctx, geometry, tg, tw)
    if wants[1]:
        gw = _to_weight(ctx, geometry, tg, tx)
    if wants[2] and tg is not None:
        gb = tg.sum([1, *range(3, tg.ndim)])
    return gx, gw, gb


def _to_input(ctx: NodeContext, geometry: Geometry, tg: Any, tw: Any) -> Any:
    out = None
    g, x, weight = (ctx.value(i) for i in range(3))
    patches = by_patches(ctx, 1, 2, geometry)
    if patches is not None:
        return None if tg is None and tw is None else patches.input_gradient_tangent(g, tg, tw)
    back = InputGradient(geometry, g, x, weight.shape[2:])
    if tg is not None:
        out = back(flat(tg), weight).unflatten(0, (len(tg), -1))
    if tw is not None:
        out = _with_weights(back, g, tw, x.shape[1], out)
    return out


def _to_weight(ctx: NodeContext, geometry: Geometry, tg: Any, tx: Any) -> Any:
    like = ctx.value(2)
    if is_gpu(like.device):
        return _to_weight_at_once(ctx, geometry, tg, tx)
    patches = by_patches(ctx, 1, 2, geometry)
    if patches is not None:
        return patches.weight_gradient_tangent(ctx.value(0), tg, tx).unflatten(2, like.shape[1:])
    parts = []
    for i in range(len(tg if tg is not None else tx)):
        total = None
        if tg is not None:
            total = _backward(ctx, tg[i], ctx.value(1), like, (False, True, False))[1]
        if tx is not None:
            more = _backward(ctx, ctx.value(0), tx[i], like, (False, True, False))[1]
            total = more if total is None else total.add_(more)
        parts.append(total)
    return torch.stack(parts)


def _to_weight_at_once(ctx: NodeContext, geometry: Geometry, tg: Any, tx: Any) -> Tensor:
    """`_to_weight` in one call for all K cotangents, and one for all K inputs."""
    g, x, like = (ctx.value(i) for i in range(3))
    terms = []
    # A weight is [O, C/g, ...], or [C, O/g, ...] if transposed. The axis of the stacked tensor's
    # channels gets K times as many: the first, which has the groups, or the second.
    if tg is not None:
        terms.append(_stacked_weight_gradient(ctx, geometry, tg, x, like, geometry.transposed))
    if tx is not None:
        terms.append(_stacked_weight_gradient(ctx, geometry, g, tx, like, not geometry.transposed))
    out = like.new_empty(len(tg if tg is not None else tx), *like.shape)
    if len(terms) == 1:
        return out.copy_(terms[0])
    return torch.add(*terms, out=out)


def _stacked_weight_gradient(
    ctx: NodeContext, geometry: Geometry, g: Tensor, x: Tensor, like: Tensor, in_second_axis: bool
) -> Tensor:
    """Gradients [K, *like.shape], strided, for K cotangents g or K inputs x, the other being one.

    `in_second_axis` says whether the weight's second axis is that of the stacked one's channels.
    """
    groups, dims = geometry.groups, like.ndim
    if g.ndim > dims:
        k, g = len(g), _stacked(g, groups)
    else:
        k, x = len(x), _stacked(x, groups)
    a, b = like.shape[:2]
    shape = (a, k * b) if in_second_axis else (k * a, b)
    stacked = _empty(like, *shape, *like.shape[2:])
    gradients = _backward(ctx, g, x, stacked, (False, True, False))[1]
    if in_second_axis:
        return gradients.unflatten(1, (k, b)).movedim(1, 0)
    # Groups are the slowest axis: each holds the channels of all K directions.
    return gradients.unflatten(0, (groups, k, -1)).movedim(1, 0).flatten(1, 2)


def _stacked(tangents: Tensor, groups: int) -> Tensor:
    """[K, n, C, ...] as [n, g K C/g, ...], images with channels last."""
    k, n, channels = tangents.shape[:3]
    out = _empty(tangents, n, k * channels, *tangents.shape[3:])
    out.unflatten(1, (groups, k, -1)).copy_(tangents.unflatten(2, (groups, -1)).movedim(0, 2))
    return out


def _backward(
    ctx: NodeContext, g: Tensor, x: Tensor, w: Tensor, wants: Any, bias_sizes: Any = None
) -> Any:
    rest = [ctx.argument(4 + i) for i in range(6)]
    if (
        wants[1]
        and x.ndim == 4
        and not is_gpu(x.device)
        and overruns_channels_last(w.shape, rest[0], rest[5])
    ):
        # Cloned, as `contiguous` leaves the strides of a 1 x 1 kernel as they are.
        g, x, w = (t.clone(memory_format=torch.contiguous_format) for t in (g, x, w))
    return aten.convolution_backward(g, x, w, bias_sizes, *rest, wants)


def forward(ctx: NodeContext) -> Any:
    """The value of the convolution."""
    geometry = Geometry.of(ctx, 3)
    patches = by_patches(ctx, 0, 1, geometry)
    if patches is not None:
        return patches.value(ctx.value(2))
    return geometry(ctx.value(0), ctx.value(1), ctx.value(2))


def backward(ctx: NodeContext) -> Any:
    """The values of the backward pass that the graph reads."""
    g, x, weight = (ctx.value(i) for i in range(3))
    gx = None
    if ctx.wanted(0):
        geometry = Geometry.of(ctx, 4)
        patches = by_patches(ctx, 1, 2, geometry)
        if patches is not None:
            gx = patches.input_gradient(g)
        else:
            gx = InputGradient(geometry, g, x, weight.shape[2:])(packed(g), weight)
    gw = gb = None
    wants = (False, ctx.wanted(1), ctx.wanted(2))
    if any(wants):
        _, gw, gb = _backward(ctx, g, x, weight, wants, ctx.argument(3))
    return gx, gw, gb
