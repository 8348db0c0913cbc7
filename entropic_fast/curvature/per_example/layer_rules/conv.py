"""Convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...._utils.workspace import scratch_of
from ....ops.conv_example_grads import conv_weight_grads, conv_weight_norms
from ._base import (
    Backward,
    DenseGrad,
    FactoredGrad,
    LayerRule,
    WeightBiasGrads,
    apart,
    at_least_float32,
    bias_grad,
    packed_bytes,
)
from ._registry import layer_rule
from .linear import OuterProductGrad


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, one entry per spatial dimension; `padding` is that in front."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def spread(self) -> Geometry:
        """With one more dimension, of kernel size 1, for several images of one example."""
        return Geometry(
            (1, *self.kernel),
            (1, *self.stride),
            (0, *self.padding),
            (1, *self.dilation),
            self.groups,
        )


class ConvGrad(FactoredGrad):
    """dW[o, c, k] = sum_p G[p, o] A[p stride + k dilation - padding, c], channels last.

    For a transposed convolution, A is the gradient of its output and G its input.
    """

    def __init__(
        self, a: Tensor, g: Tensor, geometry: Geometry
    ) -> None:  # [n, *in, C] [n, *out, O]
        self.tensors, self.geometry = (a, g), geometry

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> ConvGrad:
        return ConvGrad(tensors[0], tensors[1], self.geometry)

    @property
    def form(self) -> object:
        return self.geometry

    @property
    def _channels(self) -> int:
        return self.tensors[0].shape[-1] // self.geometry.groups

    @property
    def width(self) -> int:
        return self.tensors[1].shape[-1] * math.prod(self.geometry.kernel) * self._channels

    @property
    def groups(self) -> int:
        # Columns of one group of a grouped convolution need only that group's inputs.
        outputs = self.tensors[1].shape[-1]
        return outputs if self.geometry.groups == 1 else self.geometry.groups

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        a, g = self.tensors
        geometry, groups = self.geometry, 1
        if geometry.groups > 1:
            groups, group_outputs = end - begin, g.shape[-1] // geometry.groups
            a = a[..., begin * self._channels : end * self._channels]
            begin, end = begin * group_outputs, end * group_outputs
        self._call(conv_weight_grads, a, g[..., begin:end], groups, out=out)

    def norms(self) -> Tensor:
        a, g = self.tensors
        positions, outputs = math.prod(g.shape[1:-1]), g.shape[-1]
        inputs = math.prod(self.geometry.kernel) * self._channels
        # As for a linear layer: T^2 (I + O) operations for inner products, T I O for rows.
        if self.geometry.groups == 1 and positions * (inputs + outputs) < inputs * outputs:
            step = max(1, scratch_of(a.device).norms // max(1, self._patch_bytes))
            pairs = zip(torch.split(a, step), torch.split(g, step), strict=True)
            return torch.cat([self.with_tensors(pair)._unfolded().norms() for pair in pairs])
        return self._call(conv_weight_norms, a, g, self.geometry.groups)

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        taps = math.prod(self.geometry.kernel)
        outputs = self.tensors[1].shape[-1]
        if taps == 1 or self._channels == 1:
            return rows
        # Columns are [O, taps, C / groups], the parameter's elements [O, C / groups, taps].
        return rows.view(-1, outputs, taps, self._channels).transpose(2, 3).flatten(1)

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        g = self.tensors[1]
        positions, outputs = math.prod(g.shape[1:-1]), g.shape[-1]
        inputs = math.prod(self.geometry.kernel) * self._channels
        # As for a linear layer with T output positions: T^2 (I + O) per pair, twice for float64.
        if self.geometry.groups > 1 or 2 * positions**2 * (inputs + outputs) >= inputs * outputs:
            return None
        alone = self._patch_bytes + packed_bytes(positions, max(inputs, outputs))
        return alone, 16 * positions**2 + 16

    @property
    def _patch_bytes(self) -> int:
        """Bytes of an example's patches and of the padded images that they are cut from."""
        a, g = self.tensors
        padded = math.prod(before + n + after for before, n, after in self._padding())
        patches = math.prod(g.shape[1:-1]) * math.prod(self.geometry.kernel)
        return a.element_size() * (padded + patches) * a.shape[-1]

    def inner_products(self, other: FactoredGrad) -> Tensor:
        assert isinstance(other, ConvGrad)
        if self.geometry.groups > 1:
            return super().inner_products(other)
        return self._unfolded().inner_products(other._unfolded())

    def _unfolded(self) -> OuterProductGrad:
        """As a linear layer on patches [n, T, taps * C], for few output positions."""
        a, g = self.tensors
        geometry = self.geometry
        out = g.shape[1:-1]
        # Only the padding that some output position reads.
        pads = [size for before, _, after in self._padding()[::-1] for size in (before, after)]
        padded = torch.nn.functional.pad(a, [0, 0, *pads])
        for i in range(len(out)):
            padded = padded.unfold(
                1 + i, (geometry.kernel[i] - 1) * geometry.dilation[i] + 1, geometry.stride[i]
            )[..., :: geometry.dilation[i]].narrow(1 + i, 0, out[i])
        # [n, *out, C, *kernel] -> [n, T, taps * C]
        dims = len(out)
        patches = padded.movedim(1 + dims, -1).flatten(1, dims).flatten(2)
        return OuterProductGrad(patches, g.flatten(1, -2))

    def _padding(self) -> list[tuple[int, int, int]]:
        """For each spatial dimension: padding in front, size, and padding behind."""
        a, g = self.tensors
        geometry = self.geometry
        needed = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(
                g.shape[1:-1], geometry.stride, geometry.kernel, geometry.dilation, strict=True
            )
        ]
        return [
            # Inputs beyond the last window are not read: the padding behind may be 0.
            (before, size, max(0, need - size - before))
            for before, size, need in zip(geometry.padding, a.shape[1:-1], needed, strict=True)
        ]

    def _call(
        self, op: Callable[..., Tensor], a: Tensor, g: Tensor, groups: int, **out: Tensor
    ) -> Tensor:
        geometry = self.geometry
        return op(
            a,
            g,
            geometry.kernel,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=groups,
            **out,
        )


class Convolution(LayerRule):
    """`torch.conv1d`, `conv2d`, `conv3d`, and `conv_transpose1d` to `3d`."""

    def __init__(  # noqa: PLR0913, those of torch's functions
        self,
        dims: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_padding: Any = 0,
        transposed: bool = False,
    ) -> None:
        self.dims, self.groups, self.transposed = dims, groups, transposed
        self.weight, self.bias = weight, bias
        self.stride, self.dilation = _each(stride, dims), _each(dilation, dims)
        self.output_padding = _each(output_padding, dims)
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            # As torch does: an odd total has one more at the end, which ConvGrad has no field for.
            total = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):
                ends = [(t // 2, t - t // 2) for t in reversed(total)]
                x = functional.pad(x, [size for pair in ends for size in pair])
                padding = [0] * dims
        self.padding = _each(0 if padding == "valid" else padding, dims)
        self.x = x
        self.geometry = Geometry(kernel, self.stride, self.padding, self.dilation, groups)

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups,
        )  # fmt: skip

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        images = x if x.ndim == self.dims + 2 else x.flatten(0, 1)
        if images.device.type == "cpu" and images.ndim == 4:
            # oneDNN's float32 convolutions are up to twice as fast with channels last, and
            # ConvGrad needs that layout.
            images = images.contiguous(memory_format=torch.channels_last)
        return self.reference(images, weight, bias), (images,)

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return apart(out, self._counts(x))

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        images, counts = at.saved[0], self._counts(at.x)
        gradient = None
        if at.need_x:
            # The gradient of the input alone: that of the weight stays factored.
            gradient = torch.ops.aten.convolution_backward(
                at.g, images, at.weight, None, self.stride, self.padding, self.dilation,
                self.transposed, self.output_padding, self.groups, (True, False, False),
            )[0]  # fmt: skip
            gradient = apart(gradient, counts)
        # ConvGrad reads channels last, also where the model does not have them.
        a, b = (
            apart(t.movedim(1, -1), counts) for t in at_least_float32((images, at.g))
        )  # [n, *m, *space, channels]
        bias = bias_grad(b.flatten(1, -2), at.wanted[1])
        if not at.wanted[0]:
            return gradient, (None, bias)
        geometry = self.geometry
        # In a transposed convolution input and output gradient change places.
        if self.transposed:
            a, b = b, a
        if len(counts) == 2:
            if counts[1] == 1:
                a, b = a[:, 0], b[:, 0]
            elif self.dims < 3:
                geometry = geometry.spread()
            else:  # several volumes per example: no 4-d kernel, so add up their rows
                many = ConvGrad(a.flatten(0, 1), b.flatten(0, 1), geometry)
                return gradient, (DenseGrad(apart(many.rows(), counts).sum(1)), bias)
        return gradient, (ConvGrad(a, b, geometry), bias)

    def _counts(self, x: Tensor) -> tuple[int, ...]:
        """(n,), or (n, images per example) if the model's call has a batch axis."""
        return tuple(x.shape[: x.ndim - 1 - self.dims])


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _convolution(dims: int) -> Callable[..., LayerRule]:
    def make(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> LayerRule:  # fmt: skip
        return Convolution(dims, input, weight, bias, stride, padding, dilation, groups)

    return make


def _transposed(dims: int) -> Callable[..., LayerRule]:
    def make(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> LayerRule:  # fmt: skip
        return Convolution(
            dims, input, weight, bias, stride, padding, dilation, groups, output_padding, True
        )

    return make


layer_rule(torch.conv1d)(_convolution(1))
layer_rule(torch.conv2d)(_convolution(2))
layer_rule(torch.conv3d)(_convolution(3))
layer_rule(torch.conv_transpose1d)(_transposed(1))
layer_rule(torch.conv_transpose2d)(_transposed(2))
layer_rule(torch.conv_transpose3d)(_transposed(3))
