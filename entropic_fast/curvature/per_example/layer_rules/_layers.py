"""Layer rules: forward pass, gradient of the input, and gradients of single examples.

Each rule works on tensors whose first axis counts examples; the axes after it are those that one
example's call of the layer had, so [n, 1, C, H, W] for a convolution of images [1, C, H, W]. The
functions they stand for are in `table`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._factored_grads import (
    ConvGrad,
    DenseGrad,
    EmbeddingGrad,
    FactoredGrad,
    Geometry,
    OuterProductGrad,
    at_least_float32,
)

WeightBiasGrads = tuple[FactoredGrad | None, FactoredGrad | None]  # of weight and bias


class Backward(NamedTuple):
    """What a rule is given in the backward pass."""

    x: Tensor  # [n, ...]
    weight: Tensor | None
    saved: Sequence[Tensor]
    g: Tensor  # gradient of what `forward` returned
    need_x: bool
    wanted: tuple[bool, bool]  # pieces of weight and bias


class Layer(ABC):
    """One call of a layer's function.

    Attributes:
        x, weight, bias: its tensors.
        statistics: other tensors it reads, which must be constants.
        names: of weight and bias among the tracked parameters; None for those that are not.
        correct_under_vmap: whether torch differentiates the function rightly when vmap gives each
            example a weight of its own; if not, `vmap_safe` takes its place.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: tuple[Tensor, ...] = ()
    names: tuple[str | None, ...] = (None, None)
    correct_under_vmap = True

    @abstractmethod
    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The function itself."""

    def vmap_safe(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same by operations that vmap and autograd differentiate rightly."""
        return self.reference(x, weight, bias)

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Output for x [n, ...], and what backward needs besides x and weight.

        The output is a tensor of its own, which the model may overwrite: `shaped` makes it
        [n, ...] where it is not.
        """

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        """The output with the examples' axis of x [n, ...] first."""
        return out

    def transposed_of(self, weight: Tensor) -> Layer | None:
        """The rule in terms of a parameter whose transpose this layer's weight is; None if none."""
        return None

    def without_bias(self) -> Layer | None:
        """The layer but for a vector that is added to its output at last; None if there is none."""
        return None

    def is_small(self) -> bool:
        """Whether input and output take less memory than the weight."""
        return False

    @abstractmethod
    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        """Gradient of x if needed, and the pieces of weight and bias if wanted."""


class Linear(Layer):
    """`F.linear`: any number of axes before the last."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.x, self.weight, self.bias = input, weight, bias

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.linear(x, weight, bias)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.reference(x, weight, bias), ()

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient = at.g @ at.weight if at.need_x else None
        n = len(at.x)
        a, g = at_least_float32((at.x, at.g))
        a, g = a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1])
        return gradient, (
            OuterProductGrad(a, g) if at.wanted[0] else None,
            bias_grad(g, at.wanted[1]),
        )

    def without_bias(self) -> Layer | None:
        assert self.weight is not None
        return None if self.bias is None else type(self)(self.x, self.weight)

    def is_small(self) -> bool:
        assert self.weight is not None
        positions = self.x.numel() // max(1, self.x.shape[-1])
        return positions * sum(self.weight.shape) <= self.weight.numel()

    def transposed_of(self, weight: Tensor) -> Layer:
        return RightProduct(self.x, weight, self.bias)


class RightProduct(Linear):
    """`x @ W + b` with W [inputs, outputs], as in Hugging Face's `Conv1D`."""

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.linear(x, weight.t(), bias)

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient, (piece, bias) = super().backward(at._replace(weight=at.weight.t()))
        if isinstance(piece, OuterProductGrad):
            piece = OuterProductGrad(*reversed(piece.tensors))
        return gradient, (piece, bias)

    def transposed_of(self, weight: Tensor) -> Layer:
        return Linear(self.x, weight, self.bias)


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

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
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
        return self.reference(images, weight, bias), (images,)

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return apart(out, self._counts(x))

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        images, counts = at.saved[0], self._counts(at.x)
        gradient = None
        if at.need_x:
            gradient = torch.ops.aten.convolution_backward(
                at.g, images, at.weight, None, self.stride, self.padding, self.dilation,
                self.transposed, self.output_padding, self.groups, (True, False, False),
            )[0]  # fmt: skip
            gradient = apart(gradient, counts)
        a, b = (
            apart(t.movedim(1, -1), counts) for t in at_least_float32((images, at.g))
        )  # [n, *m, *space, channels]
        bias = bias_grad(b.flatten(1, -2), at.wanted[1])
        if not at.wanted[0]:
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
                many = ConvGrad(a.flatten(0, 1), b.flatten(0, 1), geometry)
                return gradient, (DenseGrad(apart(many.rows(), counts).sum(1)), bias)
        return gradient, (ConvGrad(a, b, geometry), bias)

    def _counts(self, x: Tensor) -> tuple[int, ...]:
        """Examples and, where the model gives them a batch axis, images an example."""
        return tuple(x.shape[: x.ndim - 1 - self.dims])

    def _images(self, x: Tensor) -> Tensor:
        return x if x.ndim == self.dims + 2 else x.flatten(0, 1)


class Embedding(Layer):
    """`F.embedding` of whole-number inputs.

    vmap of it with a table an example (torch 2.13 and 2.15) numbers the rows of all tables but
    leaves `padding_idx` as it is, so that the gradient of the padding row is wrong for every
    example but the first; and it counts frequencies over all examples.
    """

    correct_under_vmap = False

    def __init__(self, x: Tensor, weight: Tensor, padding: int | None, by_frequency: bool) -> None:
        self.x, self.weight, self.by_frequency = x, weight, by_frequency
        self.padding = padding if padding is None or padding >= 0 else len(weight) + padding

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return functional.embedding(x, weight, self.padding)

    def is_small(self) -> bool:
        assert self.weight is not None
        return self.x.numel() <= len(self.weight)

    def vmap_safe(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        out: Tensor = functional.embedding(x, weight)
        if self.by_frequency:
            flat = x.reshape(-1)
            times = torch.eq(flat[:, None], flat).sum(1).view(x.shape)[..., None]
            out = out.detach() + (out - out.detach()) / times
        if self.padding is not None:
            out = torch.where(torch.eq(x, self.padding)[..., None], out.detach(), out)
        return out

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self.reference(x, weight, bias), ()

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        (gradients,) = at_least_float32((at.g,))
        tokens = at.x.reshape(len(at.x), -1).long()
        gradients = gradients.reshape(*tokens.shape, -1)
        if self.by_frequency:
            times = torch.eq(tokens[:, :, None], tokens[:, None]).sum(2)
            gradients = gradients / times[..., None]
        if self.padding is not None:
            gradients = gradients.masked_fill((tokens == self.padding)[..., None], 0)
        return None, (EmbeddingGrad(tokens, gradients, len(at.weight)), None)


class PReLU(Layer):
    """`torch.prelu` with one slope, or one a channel."""

    def __init__(self, input: Tensor, weight: Tensor) -> None:
        self.x, self.weight = input, weight

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.prelu(x, weight)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return torch.where(x > 0, x, self._slopes(x, weight) * x), ()

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        assert at.weight is not None
        gradient = None
        if at.need_x:
            gradient = torch.where(at.x > 0, at.g, self._slopes(at.x, at.weight) * at.g)
        inputs, gradients = at_least_float32((at.x, at.g))
        products = torch.where(inputs > 0, 0, inputs * gradients)
        if at.weight.numel() > 1:
            products = products.movedim(2, 1)
        return gradient, (
            DenseGrad(products.reshape(len(at.x), at.weight.numel(), -1).sum(2)),
            None,
        )

    @staticmethod
    def _slopes(x: Tensor, weight: Tensor | None) -> Tensor:
        """The slopes along the second axis of an example, as torch has it."""
        assert weight is not None
        if weight.numel() == 1:
            return weight
        return weight.view(-1, *[1] * (x.ndim - 3))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def bias_grad(g: Tensor, wanted: bool) -> FactoredGrad | None:  # [n, T, O]
    return DenseGrad(g.sum(1)) if wanted else None


def apart(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """The first axis as several; a view."""
    return tensor.view(*counts, *tensor.shape[1:])
