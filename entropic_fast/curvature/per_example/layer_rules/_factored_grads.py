"""Gradients of single examples, one parameter at a time, in the form a layer's rule leaves them.

A piece holds the gradients of n examples with respect to one parameter. Small ones are rows
[n, p]. Those of a linear or convolution layer stay products of the layer's input A and the
gradient G of its output until something asks for more: rows, squared norms, or columns for a
Gram matrix, by whichever contraction takes fewer operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...._utils.devices import is_gpu
from ...._utils.workspace import scratch_of
from ....ops.conv_example_grads import conv_weight_grads, conv_weight_norms
from ....ops.gram_update import cross_update_

# A norm by inner products that is a smaller share of the positions' own squares is taken by rows.
CANCELS = 1e-2


class FactoredGrad(ABC):
    """Gradients of n examples with respect to one parameter of p elements.

    `write_columns` may come in another order than the parameter's elements, the same for all
    examples and all pieces of one layer: norms and Gram matrices do not depend on it. `rows` are
        in order.
    """

    tensors: tuple[Tensor, ...]  # [n, ...] each: all that is needed to make the piece again

    @abstractmethod
    def with_tensors(self, tensors: tuple[Tensor, ...]) -> FactoredGrad:
        """The same rule for other examples."""

    @property
    @abstractmethod
    def width(self) -> int:
        """p, the number of the parameter's elements."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Output channels; `write_columns` writes width / groups columns for each."""

    @abstractmethod
    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        """Write the columns of output channels begin .. end to out [n, ...], a column slice."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Squared norms in float64.  # [n]"""

    def rows(self) -> Tensor:
        """The gradients in the order of the parameter's elements.  # [n, p]"""
        out = self.tensors[-1].new_empty(self.count, self.width)
        self.write_columns(0, self.groups, out)
        return self.to_parameter_order(out)

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        """Columns put in the order of the parameter's elements.  # [n, p]"""
        return rows

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        """Bytes that `inner_products` takes for each example of either side, and for each pair.

        None where making the rows first takes fewer operations.
        """
        return None

    def inner_products(self, other: FactoredGrad) -> Tensor:
        """Inner products with other examples' gradients in float64.  # [n, m]"""
        return self.rows().double() @ other.rows().double().T

    def __getitem__(self, examples: slice) -> FactoredGrad:
        """The gradients of some of the examples."""
        return self.with_tensors(tuple(t[examples] for t in self.tensors))

    @property
    def form(self) -> object:
        """What the order of the columns, and `inner_products` with another piece, depend on."""
        return type(self)

    @property
    def count(self) -> int:
        """n, the number of examples."""
        return len(self.tensors[0])

    @property
    def example_bytes(self) -> int:
        """Bytes that `tensors` take for one example."""
        return sum(t[:1].numel() * t.element_size() for t in self.tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes that the row of one example takes."""
        return self.width * self.tensors[-1].element_size()


class DenseGrad(FactoredGrad):
    """Rows as they are; for parameters whose gradients are no larger than what makes them.

    Args:
        rows: in the order of the parameter's elements, unless they are columns.  # [n, p]
        columns_of: for the columns of another piece, its form.
    """

    def __init__(self, rows: Tensor, columns_of: object = None) -> None:
        self.tensors, self._form = (rows,), columns_of or DenseGrad

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> DenseGrad:
        return DenseGrad(tensors[0], self._form)

    @property
    def form(self) -> object:
        return self._form

    @property
    def width(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def groups(self) -> int:
        return self.width

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        out.copy_(self.tensors[0][:, begin:end])

    def norms(self) -> Tensor:
        return squared_norms(self.tensors[0])

    def rows(self) -> Tensor:
        return self.tensors[0]


class OuterProductGrad(FactoredGrad):
    """dW[o, i] = sum_t G[t, o] A[t, i]: the weight of a linear layer, T positions an example."""

    def __init__(self, a: Tensor, g: Tensor) -> None:  # [n, T, I], [n, T, O]
        self.tensors = (a, g)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> OuterProductGrad:
        return OuterProductGrad(tensors[0], tensors[1])

    @property
    def width(self) -> int:
        a, g = self.tensors
        return a.shape[2] * g.shape[2]

    @property
    def groups(self) -> int:
        return self.tensors[1].shape[2]

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        a, g = self.tensors
        block = g[:, :, begin:end]
        view = out.view(len(a), end - begin, a.shape[2])
        if a.shape[1] == 1:
            torch.mul(block.transpose(1, 2), a, out=view)
        elif view.is_contiguous():
            torch.bmm(block.transpose(1, 2), a, out=view)
        else:
            view.copy_(torch.bmm(block.transpose(1, 2), a))

    def norms(self) -> Tensor:
        a, g = self.tensors
        positions, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
        if positions == 1:
            return squared_norms(a[:, 0]) * squared_norms(g[:, 0])
        # T^2 (I + O) operations by the two small Gram matrices, T I O by the rows.
        if positions * (inputs + outputs) < inputs * outputs:
            both = torch.bmm(a, a.transpose(1, 2)).double()
            both *= torch.bmm(g, g.transpose(1, 2))
            norms = both.sum((1, 2))
            # Rounding of the inner products is eps times the positions' own squares.
            canceled = (norms < CANCELS * both.diagonal(dim1=1, dim2=2).sum(1)).nonzero()[:, 0]
            if len(canceled):
                norms[canceled] = norms_by_columns(OuterProductGrad(a[canceled], g[canceled]))
            return norms
        return norms_by_columns(self)

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        a, g = self.tensors
        positions, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
        # A pair of examples takes T^2 (I + O) operations here, I O by rows (which take T I O
        # an example to make); in float64, which counts double.
        if 2 * positions**2 * (inputs + outputs) >= inputs * outputs:
            return None
        return packed_bytes(positions, max(inputs, outputs)), 16 * positions**2 + 16

    def inner_products(self, other: FactoredGrad) -> Tensor:
        (a, g), (b, h) = self.tensors, other.tensors
        both = _inner_products(a, b)
        both *= _inner_products(g, h)
        return both.view(len(a), a.shape[1], len(b), b.shape[1]).sum((1, 3))


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: one entry a spatial dimension; padding is that before each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def spread(self) -> Geometry:
        """With a leading dimension of kernel size 1, for images that belong to one example."""
        return Geometry(
            (1, *self.kernel),
            (1, *self.stride),
            (0, *self.padding),
            (1, *self.dilation),
            self.groups,
        )


class ConvGrad(FactoredGrad):
    """dW[o, c, k] = sum_p G[p, o] A[p stride + k dilation - padding, c], channels last.

    The weight [O, C / groups, *kernel] of a convolution; of a transposed one with the roles of
    its input and output exchanged.
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
        # Columns of one group of a grouped convolution need that group's inputs alone.
        outputs = self.tensors[1].shape[-1]
        return outputs if self.geometry.groups == 1 else self.geometry.groups

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        a, g = self.tensors
        geometry, groups = self.geometry, 1
        if geometry.groups > 1:
            groups, each = end - begin, g.shape[-1] // geometry.groups
            a = a[..., begin * self._channels : end * self._channels]
            begin, end = begin * each, end * each
        self._call(conv_weight_grads, a, g[..., begin:end], groups, out=out)

    def norms(self) -> Tensor:
        a, g = self.tensors
        return self._call(conv_weight_norms, a, g, self.geometry.groups)

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        taps = math.prod(self.geometry.kernel)
        outputs = self.tensors[1].shape[-1]
        if taps == 1 or self._channels == 1:
            return rows
        return rows.view(-1, outputs, taps, self._channels).transpose(2, 3).flatten(1)

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        a, g = self.tensors
        positions, outputs = math.prod(g.shape[1:-1]), g.shape[-1]
        inputs = math.prod(self.geometry.kernel) * self._channels
        if self.geometry.groups > 1 or 2 * positions**2 * (inputs + outputs) >= inputs * outputs:
            return None
        padded = math.prod(before + n + after for before, n, after in self._padding())
        patches = a.element_size() * (padded * a.shape[-1] + positions * inputs)
        return patches + packed_bytes(positions, max(inputs, outputs)), 16 * positions**2 + 16

    def inner_products(self, other: FactoredGrad) -> Tensor:
        assert isinstance(other, ConvGrad)
        if self.geometry.groups > 1:
            return super().inner_products(other)
        return self._unfolded().inner_products(other._unfolded())

    def _unfolded(self) -> OuterProductGrad:
        """As a linear layer over patches, for few output positions.  # A [n, T, taps * C]"""
        a, g = self.tensors
        geometry = self.geometry
        out = g.shape[1:-1]
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
        """Padding before, size and padding after of each dimension that patches are cut from."""
        a, g = self.tensors
        geometry = self.geometry
        needed = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(
                g.shape[1:-1], geometry.stride, geometry.kernel, geometry.dilation, strict=True
            )
        ]
        return [
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


class EmbeddingGrad(FactoredGrad):
    """dW[v, d] = sum over positions t of token v of G[t, d]."""

    def __init__(self, tokens: Tensor, g: Tensor, vocabulary: int) -> None:  # [n, T], [n, T, D]
        self.tensors, self.vocabulary = (tokens, g), vocabulary

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> EmbeddingGrad:
        return EmbeddingGrad(tensors[0], tensors[1], self.vocabulary)

    @property
    def width(self) -> int:
        return self.vocabulary * self.tensors[1].shape[2]

    @property
    def groups(self) -> int:
        return self.tensors[1].shape[2]

    def write_columns(self, begin: int, end: int, out: Tensor) -> None:
        """Columns [n, channels of the embedding, vocabulary]."""
        tokens, g = self.tensors
        view = out.view(len(g), end - begin, self.vocabulary)
        index = tokens[:, None].expand(-1, end - begin, -1)
        view.zero_().scatter_add_(2, index, g[:, :, begin:end].transpose(1, 2))

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.groups, self.vocabulary).transpose(1, 2).flatten(1)

    def norms(self) -> Tensor:
        tokens, g = self.tensors
        n = len(tokens)
        most = max(1, scratch_of(g.device).norms // max(1, 16 * g[:1].numel()))
        if n > most:
            return torch.cat([self[i : i + most].norms() for i in range(0, n, most)])
        if is_gpu(g.device):
            return self._norms_by_order()
        example = torch.arange(n, device=tokens.device)[:, None]
        distinct, place = torch.unique(
            (example * self.vocabulary + tokens).flatten(), return_inverse=True
        )
        sums = g.new_zeros(len(distinct), g.shape[2], dtype=torch.float64)
        sums.index_add_(0, place, g.flatten(0, 1).double())
        norms: Tensor = g.new_zeros(n, dtype=torch.float64)
        norms.index_add_(0, distinct // self.vocabulary, squared_norms(sums))
        return norms

    def _norms_by_order(self) -> Tensor:
        """Norms from tokens in order, whose number of different ones the host need not know."""
        tokens, g = self.tensors
        n, positions, channels = g.shape
        tokens, order = tokens.sort(1)
        g = g.gather(1, order[:, :, None].expand_as(g)).double()
        place = torch.zeros_like(tokens)  # of a token among the different ones of its example
        torch.cumsum(tokens[:, 1:] != tokens[:, :-1], 1, out=place[:, 1:])
        place += positions * torch.arange(n, device=tokens.device)[:, None]
        sums = g.new_zeros(n * positions, channels)
        sums.index_add_(0, place.flatten(), g.flatten(0, 1))
        return squared_norms(sums.view(n, positions * channels))

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        positions, channels = self.tensors[1].shape[1:]
        if 2 * positions**2 >= self.vocabulary:
            return None
        return packed_bytes(positions, channels), 16 * positions**2 + 16

    def inner_products(self, other: FactoredGrad) -> Tensor:
        (tokens, g), (others, h) = self.tensors, other.tensors
        products = _inner_products(g, h)
        products *= tokens.flatten()[:, None] == others.flatten()[None]
        return products.view(len(g), g.shape[1], len(h), h.shape[1]).sum((1, 3))


def _inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Of every position of one side with every one of the other, in float64.

    x [n, T, C] and y [m, T, C] give [n T, m T].
    """
    rows, others = x.flatten(0, 1), y.flatten(0, 1)
    products: Tensor = x.new_zeros(len(rows), len(others), dtype=torch.float64)
    cross_update_(products, rows, others, double_products=True)
    return products


def packed_bytes(rows: int, columns: int) -> int:
    """Bytes that the products of `ops.score_gram` pack rows into: 1024 columns in float64."""
    return 8 * rows * min(columns, 1024)


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row in float64.  # [n, p] -> [n]"""
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    # On a CPU torch makes a float64 copy of what it is given.
    step = max(1, scratch_of(rows.device).norms // (8 * max(1, len(rows))))
    for i in range(0, rows.shape[1], step):
        total += torch.linalg.vector_norm(rows[:, i : i + step], dim=1, dtype=total.dtype).square_()
    return total


def norms_by_columns(piece: FactoredGrad) -> Tensor:
    """Squared norms by rows of as many examples, or columns of one, as the scratch holds.  # [n]"""
    total = piece.tensors[-1].new_zeros(piece.count, dtype=torch.float64)
    if not piece.width or not piece.count:
        return total
    each, scratch = piece.width // piece.groups, scratch_of(total.device).norms
    examples = max(1, scratch // piece.row_bytes)
    channels = max(1, scratch * piece.groups // (examples * piece.row_bytes))
    for first in range(0, piece.count, examples):
        part = piece[first : first + examples]
        for begin in range(0, piece.groups, channels):
            end = min(begin + channels, piece.groups)
            out = part.tensors[-1].new_empty(part.count, (end - begin) * each)
            part.write_columns(begin, end, out)
            total[first : first + part.count] += squared_norms(out)
    return total


def at_least_float32(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Half-precision tensors as float32, others as they are."""
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in half else t for t in tensors)
