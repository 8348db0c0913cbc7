"""Arguments of family `gram_update`, and what is required of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import check_device, check_dtype, check_like, check_shape, layout


class SymmetricUpdate(NamedTuple):
    gram: Tensor  # [E, E] float64, lower triangle updated
    rows: Tensor  # [E, K] float32 or float64
    double_products: bool


class CrossUpdate(NamedTuple):
    out: Tensor  # [M, N] float64, updated
    a: Tensor  # [M, K] float32 or float64
    b: Tensor  # [N, K]
    double_products: bool


def check_symmetric(a: SymmetricUpdate) -> None:
    _check_rows("rows", a.rows, "[E, K]")
    _check_sum("gram", a.gram, a.rows, a.rows.shape[0], a.rows.shape[0])


def check_cross(args: CrossUpdate) -> None:
    out, a, b, _ = args
    _check_rows("a", a, "[M, K]")
    _check_rows("b", b, f"[N, {a.shape[1]}]")
    if b.shape[1] != a.shape[1]:
        raise invalid("b", f"shape [N, {a.shape[1]}] as a", f"shape {list(b.shape)}")
    check_like("b", b, "a", a)
    _check_sum("out", out, a, a.shape[0], b.shape[0])


def _check_rows(name: str, rows: Tensor, shape: str) -> None:
    if rows.dim() != 2:
        raise invalid(name, f"shape {shape}", f"shape {list(rows.shape)}")
    check_dtype(name, rows)
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise invalid(name, "columns one element apart", layout(rows), f"pass {name}.contiguous()")


def _check_sum(name: str, out: Tensor, first: Tensor, rows: int, columns: int) -> None:
    """`out`, the float64 matrix that is added to."""
    check_shape(name, out, rows, columns)
    if out.dtype != torch.float64:
        raise invalid(name, "dtype torch.float64", str(out.dtype))
    check_device(name, out, "the rows", first)
    apart = (rows <= 1 or out.stride(0) >= columns) and (columns <= 1 or out.stride(1) == 1)
    if out.numel() > 0 and not apart:
        raise invalid(
            name,
            "columns one element apart and rows that do not overlap",
            layout(out),
            f"pass a contiguous {name}",
        )
