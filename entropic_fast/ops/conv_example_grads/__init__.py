"""Family `conv_example_grads`: per-example weight gradients of a convolution, and their norms.

A convolution with input `a` and gradient `g` with respect to its output has, for example e, the
weight gradient

    out[e, o, k, c] = sum_p g[e, p, o] a[e, p * stride + k * dilation - padding, first(o) + c]

over output positions p, where first(o) is the first input channel of o's group and `a` is zero
outside of its bounds. For a transposed convolution `a` and `g` are exchanged.

Sums run over positions in a fixed order in the dtype of `a`; squares are summed in float64. Results
do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from entropic_fast._utils.checks import describe, invalid, shown
from entropic_fast.ops._register import Op, no_results
from entropic_fast.ops.backend import register_family
from entropic_fast.ops.conv_example_grads import checks
from entropic_fast.ops.conv_example_grads.checks import (
    SIZES,
    ConvWeightGrads,
    ConvWeightNorms,
    channels_are_last,
)

FAMILY = "conv_example_grads"
Sizes = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]

register_family(FAMILY)

_conv_weight_grads = Op(
    FAMILY, "conv_weight_grads", ConvWeightGrads,
    check=checks.check_grads, results=no_results, writes=("out",),
)  # fmt: skip
_conv_weight_norms = Op(
    FAMILY, "conv_weight_norms", ConvWeightNorms,
    check=checks.check_norms, results=checks.new_norms,
)  # fmt: skip


def conv_weight_grads(
    a: Tensor,  # [n, *in, C], 1 to 3 spatial dimensions, channels last
    g: Tensor,  # [n, *out, O]
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    out: Tensor | None = None,  # [n, O * prod(kernel) * C / groups], rows may lie apart
) -> Tensor:  # out, its columns ordered (O, *kernel, C / groups)
    """Weight gradients of a convolution for each example, channels innermost.

    `padding` is what comes before each dimension; what comes after follows from the sizes. Slices
    of channels are read in place (if the last stride is not 1, a copy is made), and `out` may
    be a slice of the columns of a wider buffer.

    Raises:
        ValueError: dtypes other than float32 and float64, shapes, devices or layouts that do not
            fit, or an `out` that overlaps `a` or `g`.

    Example:
        >>> import torch
        >>> a = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> g = torch.tensor([[[1.0], [10.0]]])
        >>> conv_weight_grads(a, g, [2], stride=[1], padding=[0], dilation=[1])
        tensor([[21., 32.]])
    """
    a, g, sizes = _in_three_dimensions(a, g, kernel, stride, padding, dilation)
    if out is None:
        norms = ConvWeightNorms(a, g, *sizes, groups)
        checks.check_norms(norms)
        out = a.new_empty(checks.gradient_shape(norms))
    _conv_weight_grads(ConvWeightGrads(a, g, out, *sizes, groups))
    return out


def conv_weight_norms(
    a: Tensor,  # [n, *in, C], 1 to 3 spatial dimensions, channels last
    g: Tensor,  # [n, *out, O]
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:  # [n] float64
    """Squared norms of the rows of `conv_weight_grads`, which are never held in memory.

    Raises:
        ValueError: as `conv_weight_grads`.

    Example:
        >>> import torch
        >>> a, g = torch.ones(2, 4, 4, 3), torch.ones(2, 4, 4, 5)
        >>> conv_weight_norms(a, g, [1, 1], stride=[1, 1], padding=[0, 0], dilation=[1, 1])
        tensor([3840., 3840.], dtype=torch.float64)
    """
    a, g, sizes = _in_three_dimensions(a, g, kernel, stride, padding, dilation)
    return _conv_weight_norms(ConvWeightNorms(a, g, *sizes, groups))


def _in_three_dimensions(
    a: Tensor, g: Tensor, *sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Sizes]:
    """Adds leading spatial dimensions of size 1, and copies what is not channels-last."""
    spatial = a.dim() - 2
    if not 1 <= spatial <= 3:
        raise invalid("a", "shape [n, *in, C] with 1 to 3 spatial dimensions", describe(a))
    if g.dim() != a.dim():
        raise invalid("g", f"{spatial} spatial dimensions as a has", describe(g))
    filled = []
    for name, values, neutral in zip(SIZES, sizes, (1, 1, 0, 1), strict=True):
        if isinstance(values, int) or len(values) != spatial:
            raise invalid(name, f"{spatial} numbers, one for each spatial dimension", shown(values))
        filled.append([neutral] * (3 - spatial) + list(values))
    for _ in range(3 - spatial):
        a, g = a.unsqueeze(1), g.unsqueeze(1)
    a, g = (t if channels_are_last(t) else t.contiguous() for t in (a, g))
    return a, g, (filled[0], filled[1], filled[2], filled[3])
