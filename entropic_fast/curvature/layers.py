"""Layer rules: forward pass, gradient of the input, and gradients of single examples.

Each rule works on tensors whose first axis counts examples; the axes after it are those that one
example's call of the layer had, so [n, 1, C, H, W] for a convolution of images [1, C, H, W]. The
constructor takes the arguments of the function it stands for and LAYERS says which that is. A
call that a rule does not cover gives None there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.score_norm import affine_grads, batch_norm_backward
from .pieces import (
    ConvPiece,
    EmbeddingPiece,
    Geometry,
    LinearPiece,
    Piece,
    Rows,
    full_precision,
)

Pieces = tuple[Piece | None, Piece | None]  # of weight and bias


class Layer(ABC):
    """One call of a layer's function.

    Attributes:
        x, weight, bias: its tensors.
        statistics: other tensors it reads, which must be constants.
        names: of weight and bias among the tracked parameters; None for those that are not.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: tuple[Tensor, ...] = ()
    names: tuple[str | None, ...] = (None, None)

    @abstractmethod
    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The function itself."""

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Output for x [n, ...], and what backward needs besides x and weight.

        The output is a tensor of its own, which the model may overwrite: `shaped` makes it
        [n, ...] where it is not.
        """

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """The output with the examples' axis of x [n, ...] first."""
        return out

    @abstractmethod
    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        """Gradient of x if needed, and the pieces of weight and bias if wanted; g as `forward`'s."""


class Linear(Layer):
    """`F.linear`: any number of axes before the last."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.x, self.weight, self.bias = input, weight, bias

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.linear(x, weight, bias)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.plain(x, weight, bias), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        assert weight is not None
        gradient = g @ weight if need_x else None
        n = len(x)
        a, g = full_precision((x, g))
        a, g = a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1])
        return gradient, (LinearPiece(a, g) if wanted[0] else None, _bias(g, wanted[1]))


class Convolution(Layer):
    """`torch.conv1d`, `conv2d`, `conv3d` and, transposed, `torch.conv_transpose1d` ..."""

    def __init__(
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
            # As torch does: an odd total is padded once more at the end.
            total = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):
                ends = [(t // 2, t - t // 2) for t in reversed(total)]
                x = functional.pad(x, [size for pair in ends for size in pair])
                padding = [0] * dims
        self.padding = _each(0 if padding == "valid" else padding, dims)
        self.x = x
        self.geometry = Geometry(kernel, self.stride, self.padding, self.dilation, groups)

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups,
        )  # fmt: skip

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        images = self._images(x)
        if images.device.type == "cpu" and images.ndim == 4:
            # oneDNN's float32 convolutions are up to twice as fast this way, and the rule for
            # the weight reads channels last.
            images = images.contiguous(memory_format=torch.channels_last)
        return self.plain(images, weight, bias), (images,)

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return out.unflatten(0, self._counts(x))

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        images = saved[0]
        gradient = None
        if need_x:
            gradient = torch.ops.aten.convolution_backward(
                g, images, weight, None, self.stride, self.padding, self.dilation,
                self.transposed, self.output_padding, self.groups, (True, False, False),
            )[0].unflatten(0, self._counts(x))  # fmt: skip
        counts = self._counts(x)
        a, b = (
            t.movedim(1, -1).unflatten(0, counts) for t in full_precision((images, g))
        )  # [n, *m, *space, channels]
        bias = _bias(b.flatten(1, -2), wanted[1])
        if not wanted[0]:
            return gradient, (None, bias)
        geometry = self.geometry
        if self.transposed:
            a, b = b, a
        if len(counts) == 2:
            if counts[1] == 1:
                a, b = a[:, 0], b[:, 0]
            elif self.dims < 3:
                geometry = geometry.spread()
            else:  # several volumes an example: their rows, added
                many = ConvPiece(a.flatten(0, 1), b.flatten(0, 1), geometry)
                return gradient, (Rows(many.rows().unflatten(0, counts).sum(1)), bias)
        return gradient, (ConvPiece(a, b, geometry), bias)

    def _counts(self, x: Tensor) -> tuple[int, ...]:
        """Examples and, where the model gives them a batch axis, images an example."""
        return tuple(x.shape[: x.ndim - 1 - self.dims])

    def _images(self, x: Tensor) -> Tensor:
        return x if x.ndim == self.dims + 2 else x.flatten(0, 1)


class BatchNorm(Layer):
    """`F.batch_norm` by stored statistics: x is scaled and shifted by constants a channel."""

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.statistics, self.eps = (mean, variance), eps

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, variance = self.statistics
        return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.plain(x.flatten(0, 1), weight, bias), ()

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return out.unflatten(0, x.shape[:2])

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        inputs, gradients = full_precision((x, self.shaped(g, x)))
        mean, variance = full_precision(self.statistics)
        rstd = (variance.to(inputs.dtype) + self.eps).rsqrt()
        scale = torch.ones_like(rstd) if weight is None else weight.to(inputs.dtype)
        last = inputs.movedim(2, -1)
        flat = last.flatten(1, -2)
        x_gradient, weights, biases = batch_norm_backward(
            flat, gradients.movedim(2, -1).reshape(flat.shape), mean.to(inputs.dtype), rstd, scale
        )
        pieces = Rows(weights) if wanted[0] else None, Rows(biases) if wanted[1] else None
        gradient = x_gradient.view(last.shape).movedim(-1, 2).to(x.dtype) if need_x else None
        return gradient, pieces


class GroupNorm(Layer):
    """`F.group_norm`; with one channel a group, `F.instance_norm` by the instance's statistics."""

    def __init__(
        self, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        self.x, self.groups, self.weight, self.bias, self.eps = x, groups, weight, bias, eps

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.group_norm(x, self.groups, weight, bias, self.eps)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        images = x.flatten(0, 1).contiguous()
        out, mean, rstd = torch.native_group_norm(
            images, weight, bias, *self._sizes(images), self.groups, self.eps
        )
        return out, (images, mean, rstd)

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return out.unflatten(0, x.shape[:2])

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        images, mean, rstd = saved
        out = g.contiguous()
        gradient = None
        if need_x:
            gradient = torch.ops.aten.native_group_norm_backward(
                out, images, mean, rstd, weight, *self._sizes(images), self.groups,
                (True, False, False),
            )[0].unflatten(0, x.shape[:2])  # fmt: skip
        each = images.shape[1] // self.groups
        inputs, gradients, mean, rstd = full_precision((images, out, mean, rstd))
        rows = affine_grads(
            inputs.reshape(*inputs.shape[:2], -1).transpose(1, 2),
            gradients.reshape(*inputs.shape[:2], -1).transpose(1, 2),
            *(t.repeat_interleave(each, 1)[:, None].to(inputs.dtype) for t in (mean, rstd)),
        )
        return (
            gradient,
            tuple(  # type: ignore[return-value]
                Rows(r.unflatten(0, x.shape[:2]).sum(1)) if w else None
                for r, w in zip(rows, wanted, strict=True)
            ),
        )

    @staticmethod
    def _sizes(images: Tensor) -> tuple[int, int, int]:
        return len(images), images.shape[1], math.prod(images.shape[2:])


class LayerNorm(Layer):
    """`F.layer_norm` and `F.rms_norm`, which subtracts no mean and has no bias."""

    def __init__(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        centred: bool = True,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.shape, self.eps, self.centred = list(shape), eps, centred

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.centred:
            return functional.rms_norm(x, self.shape, weight, self.eps)
        assert self.eps is not None
        return functional.layer_norm(x, self.shape, weight, bias, self.eps)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.plain(x, weight, bias), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        n, width = len(x), math.prod(self.shape)
        inputs, gradients = (
            t.reshape(n, math.prod(x.shape[1 : x.ndim - len(self.shape)]), width)
            for t in full_precision((x, g))
        )
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        mean = inputs.mean(2, keepdim=True) if self.centred else inputs.new_zeros(1, 1, 1)
        rstd = ((inputs - mean).square().mean(2, keepdim=True) + eps).rsqrt()
        gradient = None
        if need_x:
            scaled = gradients
            if weight is not None:
                scaled = gradients * weight.reshape(-1).to(gradients.dtype)
            normal = (inputs - mean) * rstd
            gradient = scaled - normal * (scaled * normal).mean(2, keepdim=True)
            if self.centred:
                gradient -= scaled.mean(2, keepdim=True)
            gradient = (gradient * rstd).view(x.shape).to(x.dtype)
        rows = affine_grads(inputs, gradients, mean, rstd)
        return gradient, tuple(  # type: ignore[return-value]
            Rows(r) if w else None for r, w in zip(rows, wanted, strict=True)
        )


class Embedding(Layer):
    """`F.embedding` of whole-number inputs."""

    def __init__(self, x: Tensor, weight: Tensor, padding: int | None) -> None:
        self.x, self.weight = x, weight
        self.padding = padding if padding is None or padding >= 0 else len(weight) + padding

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.embedding(x, weight, self.padding)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.plain(x, weight, bias), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        assert weight is not None
        (gradients,) = full_precision((g,))
        tokens = x.reshape(len(x), -1).long()
        gradients = gradients.reshape(*tokens.shape, -1)
        if self.padding is not None:
            gradients = gradients.masked_fill((tokens == self.padding)[..., None], 0)
        return None, (EmbeddingPiece(tokens, gradients, len(weight)), None)


class PReLU(Layer):
    """`torch.prelu` with one slope, or one a channel."""

    def __init__(self, input: Tensor, weight: Tensor) -> None:
        self.x, self.weight = input, weight

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.prelu(x, weight)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return torch.where(x > 0, x, self._slopes(x, weight) * x), ()

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        g: Tensor,
        need_x: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Pieces]:
        assert weight is not None
        gradient = torch.where(x > 0, g, self._slopes(x, weight) * g) if need_x else None
        inputs, gradients = full_precision((x, g))
        products = torch.where(inputs > 0, 0, inputs * gradients)
        if weight.numel() > 1:
            products = products.movedim(2, 1)
        return gradient, (Rows(products.reshape(len(x), weight.numel(), -1).sum(2)), None)

    @staticmethod
    def _slopes(x: Tensor, weight: Tensor | None) -> Tensor:
        """The slopes along the second axis of an example, as torch has it."""
        assert weight is not None
        if weight.numel() == 1:
            return weight
        return weight.view(-1, *[1] * (x.ndim - 3))


# -- which function each rule stands for ---------------------------------------------------------


def _convolution(dims: int) -> Callable[..., Layer]:
    def make(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Layer:
        return Convolution(dims, input, weight, bias, stride, padding, dilation, groups)

    return make


def _transposed(dims: int) -> Callable[..., Layer]:
    def make(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Layer:
        return Convolution(
            dims, input, weight, bias, stride, padding, dilation, groups, output_padding, True
        )

    return make


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layer | None:
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return None
    return BatchNorm(input, running_mean, running_var, weight, bias, eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Layer | None:
    return GroupNorm(input, num_groups, weight, bias, eps) if input.ndim >= 2 else None


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layer | None:
    if input.ndim < 3:
        return None
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None or running_var is not None:
        return None
    return GroupNorm(input, input.shape[1], weight, bias, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Layer:
    return LayerNorm(input, normalized_shape, weight, bias, eps)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Layer:
    return LayerNorm(input, normalized_shape, weight, None, eps, centred=False)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Layer | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return Embedding(input, weight, padding_idx)


LAYERS: dict[Any, Callable[..., Layer | None]] = {
    functional.linear: Linear,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
    functional.batch_norm: _batch_norm,
    functional.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.embedding: _embedding,
    torch.prelu: PReLU,
}


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _bias(g: Tensor, wanted: bool) -> Piece | None:  # [n, T, O]
    return Rows(g.sum(1)) if wanted else None
