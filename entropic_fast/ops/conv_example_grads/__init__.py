"""Family `conv_example_grads`: per-example weight gradients of a convolution, and their norms.

A convolution with input `a` and gradient `g` with respect to its output has, for example e, the
weight gradient

    out[e, o, k, c] = sum_p g[e, p, o] a[e, p * stride + k * dilation - padding, first(o) + c]

over output positions p, where first(o) is the first input channel of o's group and `a` is zero
outside of its bounds. One ordinary backward pass gives `a` and `g` of a whole batch; these ops take
them apart again, which backward passes one example at a time would do at many times the cost.
`conv_weight_norms` keeps only squared norms and never holds the gradients.

The weight gradient of a transposed convolution is the same sum with `a` and `g` exchanged.

Sums run over positions in a fixed order in the dtype of `a`; squares are taken and summed in
float64. Results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from entropic_fast._utils.checks import describe, integer, invalid, shown
from entropic_fast.ops.backend import implementation, register_family

FAMILY = "conv_example_grads"
DTYPES = (torch.float32, torch.float64)
Sizes = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
_SIZES = ("kernel", "stride", "padding", "dilation")

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.conv_example_grads.reference",
        "cpp": "entropic_fast.ops.conv_example_grads.native",
        "triton": "entropic_fast.ops.conv_example_grads.triton",
    },
    writes={"conv_weight_grads": (2,)},
)


# ---- public functions ----------------------------------------------------------------------------


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
    of channels are read in place (the last stride has to be 1, else a copy is made), and `out` may
    be a slice of the columns of a wider buffer.

    Raises:
        ValueError: dtypes other than float32 and float64, shapes, devices or layouts that do not
            fit, or an `out` that overlaps `a` or `g`.

    Example:
        >>> a = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> g = torch.tensor([[[1.0], [10.0]]])
        >>> conv_weight_grads(a, g, [2], stride=[1], padding=[0], dilation=[1])
        tensor([[21., 32.]])
    """
    a, g, sizes = _in_three_dimensions(a, g, kernel, stride, padding, dilation)
    if out is None:
        _check(a, g, *sizes, groups)
        out = a.new_empty(_out_shape(a, g, sizes[0], groups))
    torch.ops.entropic_fast.conv_weight_grads(a, g, out, *sizes, groups)
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
        >>> a, g = torch.ones(2, 4, 4, 3), torch.ones(2, 4, 4, 5)
        >>> conv_weight_norms(a, g, [1, 1], stride=[1, 1], padding=[0, 0], dilation=[1, 1])
        tensor([3840., 3840.], dtype=torch.float64)
    """
    a, g, sizes = _in_three_dimensions(a, g, kernel, stride, padding, dilation)
    norms: Tensor = torch.ops.entropic_fast.conv_weight_norms(a, g, *sizes, groups)
    return norms


# ---- registration with torch, three spatial dimensions -------------------------------------------


@torch.library.custom_op("entropic_fast::conv_weight_grads", mutates_args=("out",))
def _conv_weight_grads(
    a: Tensor,
    g: Tensor,
    out: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _check(a, g, kernel, stride, padding, dilation, groups)
    _check_out(out, a, g, kernel, groups)
    _check_overlap(out, a=a, g=g)
    implementation(FAMILY, a.device).conv_weight_grads(
        a, g, out, kernel, stride, padding, dilation, groups
    )


@_conv_weight_grads.register_fake
def _(
    a: Tensor,
    g: Tensor,
    out: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _check(a, g, kernel, stride, padding, dilation, groups)
    _check_out(out, a, g, kernel, groups)


@torch.library.custom_op("entropic_fast::conv_weight_norms", mutates_args=())
def _conv_weight_norms(
    a: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(a, g, kernel, stride, padding, dilation, groups)
    norms: Tensor = implementation(FAMILY, a.device).conv_weight_norms(
        a, g, kernel, stride, padding, dilation, groups
    )
    return norms


@_conv_weight_norms.register_fake
def _(
    a: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(a, g, kernel, stride, padding, dilation, groups)
    return a.new_empty(a.shape[0], dtype=torch.float64)


# ---- checks --------------------------------------------------------------------------------------


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
    for name, values, neutral in zip(_SIZES, sizes, (1, 1, 0, 1), strict=True):
        if isinstance(values, int) or len(values) != spatial:
            raise invalid(name, f"{spatial} numbers, one for each spatial dimension", shown(values))
        filled.append([neutral] * (3 - spatial) + list(values))
    for _ in range(3 - spatial):
        a, g = a.unsqueeze(1), g.unsqueeze(1)
    a, g = (t if _channels_are_last(t) else t.contiguous() for t in (a, g))
    return a, g, (filled[0], filled[1], filled[2], filled[3])


def _channels_are_last(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _check(
    a: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    integer("groups", groups, 1)
    for name, tensor, channels in (("a", a, "C"), ("g", g, "O")):
        if tensor.dim() != 5:
            raise invalid(name, f"shape [n, depth, height, width, {channels}]", describe(tensor))
        if tensor.dtype not in DTYPES:
            raise invalid(name, "dtype float32 or float64", str(tensor.dtype), "convert it first")
        if not _channels_are_last(tensor):
            raise invalid(
                name,
                "channels last with stride 1",
                f"strides {tensor.stride()}",
                f"pass {name}.contiguous()",
            )
        if tensor.shape[-1] % groups:
            raise invalid(
                name, f"a number of channels that {groups} groups divide", str(tensor.shape[-1])
            )
    if g.shape[0] != a.shape[0]:
        raise invalid("g", f"{a.shape[0]} examples as a has", str(g.shape[0]))
    if g.dtype != a.dtype:
        raise invalid("g", f"dtype {a.dtype} as a has", str(g.dtype), "convert one")
    if g.device != a.device:
        raise invalid("g", f"device {a.device} as a", str(g.device), "move it there")
    sizes = zip(_SIZES, (kernel, stride, padding, dilation), (1, 1, 0, 1), strict=True)
    for name, values, least in sizes:
        if len(values) != 3:
            raise invalid(name, "three numbers", shown(list(values)))
        for value in values:
            integer(name, value, least)


def _out_shape(a: Tensor, g: Tensor, kernel: Sequence[int], groups: int) -> tuple[int, int]:
    return a.shape[0], g.shape[-1] * prod(kernel) * (a.shape[-1] // groups)


def _check_out(out: Tensor, a: Tensor, g: Tensor, kernel: Sequence[int], groups: int) -> None:
    shape = _out_shape(a, g, kernel, groups)
    if tuple(out.shape) != shape:
        raise invalid("out", f"shape {list(shape)}", f"shape {list(out.shape)}")
    if out.dtype != a.dtype:
        raise invalid("out", f"dtype {a.dtype} as a has", str(out.dtype))
    if out.device != a.device:
        raise invalid("out", f"device {a.device} as a", str(out.device), "allocate it there")
    rows, width = shape
    if (width > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < width):
        raise invalid("out", "rows that are contiguous and lie apart", f"strides {out.stride()}")


def _check_overlap(out: Tensor, **read: Tensor) -> None:
    start, end = _span(out)
    for name, tensor in read.items():
        other_start, other_end = _span(tensor)
        if start < other_end and other_start < end:
            raise invalid("out", f"memory of its own, apart from {name}", "tensors that overlap")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor and the one after its last; the same for an empty tensor."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
