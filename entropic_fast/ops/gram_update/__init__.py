"""Family `gram_update`: products of score rows, added in place to a float64 Gram matrix.

The Gram matrix of E examples is built slice by slice: `symmetric_update_` adds what one slice of K
columns contributes, S S^T, to its lower triangle; `cross_update_` does the same for two different
sets of rows.

float32 rows are multiplied and summed in float32 over at most `BLOCK` columns; each such sum is
added to the float64 matrix. With u = 2^-24 the error of an entry is at most

    BLOCK u sum_k |a_k b_k|,

whatever K. In practice rounding errors have random signs and the error falls as K grows: below
2 u |a| |b| / sqrt(K / BLOCK) where products have random signs, below 16 u |a| |b| / sqrt(K / BLOCK)
where all have one sign, as on the diagonal. One float32 sum over all K columns would err more as K
grows. With `double_products`, and for float64 rows, products and sums are float64 throughout.

Results do not depend on the number of threads, and are the same bits run after run on one backend.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast._utils.devices import is_gpu
from entropic_fast.ops.backend import backend_for, implementation, register_family, setting_for

FAMILY = "gram_update"
DTYPES = (torch.float32, torch.float64)
BLOCK = 256  # columns of one float32 sum
# Compute capabilities whose tensor cores multiply float64 as fast as other cores multiply float32
# (A100, H100 and H200, B200). Triton has the shape m8n8k4 alone for them, which runs at half of
# Hopper's rate, from memory; cuBLAS has all shapes, and a copy of float32 rows in float64 is read
# E / 128 times. Other GPUs have float64 at 1/2 (7.0) to 1/64 of float32's rate (8.6, 8.9, 12.0),
# with nothing to win. To be measured.
FLOAT64_TENSOR_CORES = frozenset({(8, 0), (9, 0), (10, 0)})

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.gram_update.reference",
        "cpp": "entropic_fast.ops.gram_update.native",
        "triton": "entropic_fast.ops.gram_update.triton",
    },
    writes={"symmetric_update_": (0,), "cross_update_": (0,)},
)


# ---- public functions ----------------------------------------------------------------------------


def symmetric_update_(
    gram: Tensor,  # [E, E] float64, lower triangle updated in place
    rows: Tensor,  # [E, K] float32 or float64
    *,
    double_products: bool = False,
) -> None:
    """Adds rows @ rows.T to the lower triangle of `gram`; the strict upper one is not touched.

    Both may be column slices of wider tensors: columns contiguous, rows any distance apart.

    Raises:
        ValueError: dtypes, shapes, devices or layouts that do not fit, `gram` overlapping `rows`,
            or tensors that autograd follows.

    Example:
        >>> gram = torch.zeros(2, 2, dtype=torch.float64)
        >>> symmetric_update_(gram, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gram
        tensor([[ 5.,  0.],
                [11., 25.]], dtype=torch.float64)
    """
    _refuse_autograd(gram=gram, rows=rows)
    torch.ops.entropic_fast.gram_symmetric_update_(gram, rows, double_products)


def cross_update_(
    out: Tensor,  # [M, N] float64, updated in place
    a: Tensor,  # [M, K] float32 or float64
    b: Tensor,  # [N, K] like a
    *,
    double_products: bool = False,
) -> None:
    """Adds a @ b.T to `out`: the block of a Gram matrix between two sets of rows.

    Layouts and errors as `symmetric_update_`.

    Example:
        >>> out = torch.zeros(1, 2, dtype=torch.float64)
        >>> cross_update_(out, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        >>> out
        tensor([[11., 17.]], dtype=torch.float64)
    """
    _refuse_autograd(out=out, a=a, b=b)
    torch.ops.entropic_fast.gram_cross_update_(out, a, b, double_products)


# ---- which arithmetic a GPU has ------------------------------------------------------------------


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU."""
    return torch.cuda.get_device_capability(device)


def chosen_backend(device: torch.device, double: bool) -> str:
    """The backend for an update; `double`: with float64 products, of rows of either dtype.

    Under "auto" GPUs in `FLOAT64_TENSOR_CORES` have float64 products by "reference", which is
    cuBLAS there, where Triton would be next.
    """
    chosen = backend_for(FAMILY, device)
    if double and chosen == "triton" and setting_for(device) == "auto" and is_gpu(device):
        return "reference" if compute_capability(device) in FLOAT64_TENSOR_CORES else chosen
    return chosen


def _module(device: torch.device, double: bool) -> ModuleType:
    chosen = chosen_backend(device, double)
    own = chosen != backend_for(FAMILY, device)
    return implementation(FAMILY, device, chosen if own else None)


# ---- registration with torch ---------------------------------------------------------------------


@torch.library.custom_op("entropic_fast::gram_symmetric_update_", mutates_args=("gram",))
def _symmetric_update_(gram: Tensor, rows: Tensor, double_products: bool) -> None:
    _check_symmetric(gram, rows)
    _check_overlap("gram", gram, rows=rows)
    module = _module(gram.device, double_products or rows.dtype == torch.float64)
    module.symmetric_update_(gram, rows, double_products)


@_symmetric_update_.register_fake
def _(gram: Tensor, rows: Tensor, double_products: bool) -> None:
    _check_symmetric(gram, rows)


@torch.library.custom_op("entropic_fast::gram_cross_update_", mutates_args=("out",))
def _cross_update_(out: Tensor, a: Tensor, b: Tensor, double_products: bool) -> None:
    _check_cross(out, a, b)
    _check_overlap("out", out, a=a, b=b)
    module = _module(out.device, double_products or a.dtype == torch.float64)
    module.cross_update_(out, a, b, double_products)


@_cross_update_.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, double_products: bool) -> None:
    _check_cross(out, a, b)


# ---- checks --------------------------------------------------------------------------------------


def _refuse_autograd(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise invalid(
                name,
                "a tensor that autograd does not follow",
                "one with requires_grad=True",
                f"call under torch.no_grad() or pass {name}.detach()",
            )


def _check_rows(name: str, rows: Tensor, shape: str) -> None:
    if rows.dim() != 2:
        raise invalid(name, f"shape {shape}", f"shape {list(rows.shape)}")
    if rows.dtype not in DTYPES:
        raise invalid(name, "dtype float32 or float64", str(rows.dtype), "convert it first")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise invalid(
            name,
            "columns one element apart",
            f"strides {rows.stride()} for shape {list(rows.shape)}",
            f"pass {name}.contiguous()",
        )


def _check_sum(name: str, out: Tensor, first: Tensor, rows: int, columns: int) -> None:
    """`out`, the float64 matrix that is added to."""
    if tuple(out.shape) != (rows, columns):
        raise invalid(name, f"shape {[rows, columns]}", f"shape {list(out.shape)}")
    if out.dtype != torch.float64:
        raise invalid(name, "dtype torch.float64", str(out.dtype))
    if out.device != first.device:
        raise invalid(name, f"device {first.device} as the rows", str(out.device), "move it there")
    apart = (rows <= 1 or out.stride(0) >= columns) and (columns <= 1 or out.stride(1) == 1)
    if out.numel() > 0 and not apart:
        raise invalid(
            name,
            "columns one element apart and rows that do not overlap",
            f"strides {out.stride()} for shape {list(out.shape)}",
            f"pass a contiguous {name}",
        )


def _check_symmetric(gram: Tensor, rows: Tensor) -> None:
    _check_rows("rows", rows, "[E, K]")
    _check_sum("gram", gram, rows, rows.shape[0], rows.shape[0])


def _check_cross(out: Tensor, a: Tensor, b: Tensor) -> None:
    _check_rows("a", a, "[M, K]")
    _check_rows("b", b, f"[N, {a.shape[1]}]")
    if b.shape[1] != a.shape[1]:
        raise invalid("b", f"shape [N, {a.shape[1]}] as a", f"shape {list(b.shape)}")
    if b.dtype != a.dtype:
        raise invalid("b", f"dtype {a.dtype} as a", str(b.dtype), "convert one of them")
    if b.device != a.device:
        raise invalid("b", f"device {a.device} as a", str(b.device), "move it there")
    _check_sum("out", out, a, a.shape[0], b.shape[0])


def _check_overlap(name: str, written: Tensor, **read: Tensor) -> None:
    """Refuses tensors whose address ranges meet."""
    start, end = _span(written)
    for other, tensor in read.items():
        other_start, other_end = _span(tensor)
        if start < other_end and other_start < end:
            raise invalid(name, f"memory of its own, apart from {other}", "overlap", "clone one")


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
