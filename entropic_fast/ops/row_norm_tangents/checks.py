"""Arguments of family `row_norm_tangents`, and what is required of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import check_contiguous, check_dtype, check_like, check_shape


class Jvp(NamedTuple):
    t: Tensor  # [K, M, d] float32 or float64
    normal: Tensor  # [M, d]
    rstd: Tensor  # [M]
    weight: Tensor | None  # [d]
    tweight: Tensor | None  # [K, d]
    tbias: Tensor | None  # [K, d]
    cotangent: Tensor | None  # [M, d]
    centered: bool


class VjpTangent(NamedTuple):
    normal: Tensor  # [M, d] float32 or float64
    rstd: Tensor  # [M]
    u: Tensor | None  # [K, M, d]
    t: Tensor | None  # [K, M, d], needs cotangent
    weight: Tensor | None  # [d]
    tweight: Tensor | None  # [K, d], needs cotangent
    cotangent: Tensor | None  # [M, d]
    centered: bool
    weights: bool  # whether dweight and dbias are wanted


def tangents_of(a: VjpTangent) -> int:
    """K."""
    return len(next(t for t in (a.u, a.t, a.tweight) if t is not None))


def new_jvp(a: Jvp) -> tuple[Tensor, Tensor]:  # out, terms: [K, M, d], [K] or [0]
    terms = a.t.new_empty(0 if a.cotangent is None else len(a.t), dtype=torch.float64)
    return torch.empty_like(a.t), terms


def new_vjp_tangent(
    a: VjpTangent,
) -> tuple[Tensor, Tensor, Tensor]:  # out, dweight, dbias: [K, M, d], [K, d] or [0, 0] each
    k, (m, d) = tangents_of(a), a.normal.shape
    shape = (k, d) if a.weights else (0, 0)
    return a.normal.new_empty(k, m, d), a.normal.new_empty(shape), a.normal.new_empty(shape)


def check_jvp(a: Jvp) -> None:
    if a.t.dim() != 3:
        raise invalid("t", "shape [K, M, d]", f"shape {list(a.t.shape)}")
    _check(a, *a.t.shape)


def check_vjp_tangent(a: VjpTangent) -> None:
    if a.normal.dim() != 2:
        raise invalid("normal", "shape [M, d]", f"shape {list(a.normal.shape)}")
    if a.u is None and a.t is None and a.tweight is None:
        raise invalid("u, t, tweight", "at least one tensor", "None")
    for name in ("t", "tweight"):
        if getattr(a, name) is not None and a.cotangent is None:
            raise invalid("cotangent", f"a tensor, as {name} is given", "None")
    _check(a, tangents_of(a), *a.normal.shape)


def _check(a: Jvp | VjpTangent, k: int, m: int, d: int) -> None:
    shapes = {
        "t": (k, m, d), "u": (k, m, d), "normal": (m, d), "cotangent": (m, d), "rstd": (m,),
        "weight": (d,), "tweight": (k, d), "tbias": (k, d),
    }  # fmt: skip
    check_dtype("normal", a.normal)
    for name, tensor in a._asdict().items():
        if isinstance(tensor, Tensor):
            check_shape(name, tensor, *shapes[name])
            check_like(name, tensor, "normal", a.normal)
            check_contiguous(**{name: tensor})
