"""What layer rules are made of: factored gradients, and the base class of a rule.

The gradients of a linear or convolution layer stay a pair of tensors, the layer's input A and the
gradient G of its output, until a contraction is needed: rows, squared norms, or columns for a Gram
matrix, whichever takes fewer operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...._utils.workspace import scratch_of
from ....ops.gram_update import cross_update_

# A squared norm from inner products has the rounding of the positions' own squares: if it is a
# smaller share of their sum, positions cancel, and it is computed from rows instead.
CANCELS = 1e-2


class FactoredGrad(ABC):
    """Gradients of n examples with respect to one parameter of p elements.

    `rows` are in the parameter's order. `write_columns` may use another order, the same for all
    examples, on which norms and Gram matrices do not depend. `tensors` are [n, ...] each.
    """

    tensors: tuple[Tensor, ...]

    @abstractmethod
    def with_tensors(self, tensors: tuple[Tensor, ...]) -> FactoredGrad:
        """The same kind of gradient for other examples."""

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
        """Squared norms [n] in float64."""

    def rows(self) -> Tensor:
        """The gradients [n, p] in the order of the parameter's elements."""
        # The columns of all output channels are a row, up to their order.
        out = self.tensors[-1].new_empty(self.count, self.width)
        self.write_columns(0, self.groups, out)
        return self.to_parameter_order(out)

    def to_parameter_order(self, rows: Tensor) -> Tensor:
        """Columns [n, p], reordered to the parameter's elements."""
        return rows

    @property
    def inner_product_bytes(self) -> tuple[int, int] | None:
        """Bytes that `inner_products` needs per example of either side, and per pair of examples.

        None if computing the rows first takes fewer operations.
        """
        return None

    def inner_products(self, other: FactoredGrad) -> Tensor:
        """Inner products [n, m] with the gradients of m other examples, in float64."""
        return self.rows().double() @ other.rows().double().T

    def __getitem__(self, examples: slice) -> FactoredGrad:
        """The gradients of some of the examples."""
        return self.with_tensors(tuple(t[examples] for t in self.tensors))

    @property
    def form(self) -> object:
        """What the order of columns depends on; gradients of equal form can be multiplied."""
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
    """Rows [n, p] in the parameter's order, or columns of another gradient (`columns_of`)."""

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


WeightBiasGrads: TypeAlias = tuple[FactoredGrad | None, FactoredGrad | None]  # of weight and bias


class Backward(NamedTuple):
    """What a layer rule is given in the backward pass."""

    x: Tensor  # [n, ...]
    weight: Tensor | None
    saved: Sequence[Tensor]
    g: Tensor  # gradient of what `forward` returned
    need_x: bool
    wanted: tuple[bool, bool]  # whether gradients of weight and bias are


class LayerRule(ABC):
    """A layer rule, applied to one call of a torch function.

    Tensors have one axis for examples, the first, and then those of the call for one example: a
    convolution of images [1, C, H, W] gets [n, 1, C, H, W].

    Attributes:
        x, weight, bias: the tensors of the call.
        statistics: other tensors that it reads, which must be constants.
        names: names of weight and bias among the tracked parameters; None if they are not.
        correct_under_vmap: whether torch's derivatives are right when vmap gives each example its
            own weight; if not, `vmap_safe` is used.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: tuple[Tensor, ...] = ()
    names: tuple[str | None, ...] = (None, None)
    correct_under_vmap = True

    @abstractmethod
    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The torch function itself."""

    def vmap_safe(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same function, from operations whose derivatives under vmap are right."""
        return self.reference(x, weight, bias)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Output for x [n, ...], and what `backward` needs besides x and weight.

        The output is a new tensor, as the model may overwrite it. If its first axis is not that of
        the examples, `shaped` gives the view that has it.
        """
        return self.reference(x, weight, bias), ()

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        """The output as a view [n, ...]."""
        return out

    def transposed_of(self, weight: Tensor) -> LayerRule | None:
        """The rule for a parameter of which this weight is the transpose; None if there is none."""
        return None

    def without_bias(self) -> LayerRule | None:
        """The rule without the bias, if the bias is a vector added to the output; else None."""
        return None

    def is_small(self) -> bool:
        """Whether input and output together take less memory than the weight."""
        return False

    @abstractmethod
    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        """Gradient of x if needed, and the factored gradients of weight and bias if wanted."""


def bias_grad(g: Tensor, wanted: bool) -> FactoredGrad | None:  # [n, T, O]
    return DenseGrad(g.sum(1)) if wanted else None


def apart(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """A view with the first axis split into several."""
    return tensor.view(*counts, *tensor.shape[1:])


def position_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [n T, m T] of the positions of x [n, T, C] and y [m, T, C], in float64."""
    rows, others = x.flatten(0, 1), y.flatten(0, 1)
    products: Tensor = x.new_zeros(len(rows), len(others), dtype=torch.float64)
    # In float64, since terms of both signs cancel in the sum over positions.
    cross_update_(products, rows, others, double_products=True)
    return products


def packed_bytes(rows: int, columns: int) -> int:
    """Bytes of the float64 copies that `ops.gram_update` makes of rows, 1024 columns at a time."""
    return 8 * rows * min(columns, 1024)


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms [n] of rows [n, p], in float64."""
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    # On a CPU torch copies its input to float64: slices keep the copy within the scratch.
    step = max(1, scratch_of(rows.device).norms // (8 * max(1, len(rows))))
    for i in range(0, rows.shape[1], step):
        total += torch.linalg.vector_norm(rows[:, i : i + step], dim=1, dtype=total.dtype).square_()
    return total


def norms_by_columns(grad: FactoredGrad) -> Tensor:
    """Squared norms [n] from rows of as many examples, or columns of one, as the scratch holds."""
    total = grad.tensors[-1].new_zeros(grad.count, dtype=torch.float64)
    if not grad.width or not grad.count:
        return total
    channel_width, scratch = grad.width // grad.groups, scratch_of(total.device).norms
    examples = max(1, scratch // grad.row_bytes)
    channels = max(1, scratch * grad.groups // (examples * grad.row_bytes))
    # As many rows as the scratch holds; a single row that is larger, by slices of channels.
    for first in range(0, grad.count, examples):
        chunk = grad[first : first + examples]
        for begin in range(0, grad.groups, channels):
            end = min(begin + channels, grad.groups)
            out = chunk.tensors[-1].new_empty(chunk.count, (end - begin) * channel_width)
            chunk.write_columns(begin, end, out)
            total[first : first + chunk.count] += squared_norms(out)
    return total


def at_least_float32(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Half-precision tensors as float32, others as they are."""
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in half else t for t in tensors)
