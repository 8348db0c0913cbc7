"""Arguments of family `norm_act_tangents`, and what is required of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import check_dtype, check_like, layout


class Jvp(NamedTuple):
    u: Tensor  # [K, m, C] float32 or float64, overwritten with u + extra
    extra: Tensor | None  # [K, m, C], any strides of k and pixels
    normal: Tensor | None  # [m, C]
    scale: Tensor | None  # [C]
    tscale: Tensor | None  # [K, C], needs normal
    tshift: Tensor | None  # [K, C]
    residual: Tensor | None  # [K, m, C]
    slope: Tensor | None  # [m, C]
    cotangent: Tensor | None  # [m, C]
    bend: Tensor | None  # [m, C]
    out: Tensor  # [K, m, C], written


class VjpTangent(NamedTuple):
    u: Tensor  # [K, m, C] float32 or float64, overwritten with slope (u + extra + residual)
    extra: Tensor | None  # [K, m, C], any strides of k and pixels
    residual: Tensor | None  # [K, m, C]
    slope: Tensor | None  # [m, C]
    normal: Tensor | None  # [m, C]
    scale: Tensor | None  # [C]
    tscale: Tensor | None  # [K, C], needs cotangent
    cotangent: Tensor | None  # [m, C]
    ty: Tensor | None  # [K, m, C], needs cotangent
    rstd: Tensor | None  # [C]
    out: Tensor | None  # [K, m, C], written; None: the result is u


class NormAct(NamedTuple):
    y: Tensor  # [m, C] float32 or float64
    mean: Tensor  # [C]
    rstd: Tensor  # [C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    residual: Tensor | None  # [m, C]
    relu: bool


class InnerProducts(NamedTuple):
    a: Tensor  # [K, m, C] float32 or float64
    b: Tensor  # [K, m, C], any strides of k and pixels


# Shape of every argument but the first; "dense" where pixels are C apart, too.
FORMS = {
    "extra": "KmC", "b": "KmC", "out": "KmC dense", "residual": "KmC dense", "ty": "KmC dense",
    "mean": "C", "weight": "C", "bias": "C",
    "normal": "mC", "slope": "mC", "cotangent": "mC", "bend": "mC",
    "scale": "C", "rstd": "C", "tscale": "KC", "tshift": "KC",
}  # fmt: skip


def new_sums(a: Jvp) -> tuple[Tensor, Tensor]:  # sums, forms: [K, C] or [0, 0], [K] or [0]
    k, _, c = a.u.shape
    sums = a.u.new_empty((0, 0) if a.cotangent is None else (k, c), dtype=torch.float64)
    return sums, a.u.new_empty(0 if a.bend is None else k, dtype=torch.float64)


def new_weight_tangents(a: VjpTangent) -> tuple[Tensor, Tensor]:  # dscale, dshift: [K, C]
    dscale = a.u.new_empty(a.u.shape[0], a.u.shape[2])
    return dscale, torch.empty_like(dscale)


def new_values(a: NormAct) -> tuple[Tensor, Tensor, Tensor]:  # z, normal, slope: [m, C]
    slope = a.y.new_empty(a.y.shape if a.relu else (0, 0))
    return a.y.new_empty(a.y.shape), a.y.new_empty(a.y.shape), slope


def new_inner_products(a: InnerProducts) -> Tensor:  # [K]
    return a.a.new_empty(a.a.shape[0], dtype=torch.float64)


def check_jvp(a: Jvp) -> None:
    _check("u", a.u, a._asdict())
    _check_apart("u", a.u)
    _check_apart("out", a.out)
    _needs(a, "tscale", "normal")


def check_vjp_tangent(a: VjpTangent) -> None:
    _check("u", a.u, a._asdict())
    _check_apart("u", a.u)
    if a.out is not None:
        _check_apart("out", a.out)
    _needs(a, "tscale", "cotangent")
    _needs(a, "ty", "cotangent")


def check_norm_act(a: NormAct) -> None:
    if a.y.dim() != 2:
        raise invalid("y", "shape [m, C]", f"shape {list(a.y.shape)}")
    residual = None if a.residual is None else a.residual[None]
    _check("y", a.y[None], {**a._asdict(), "residual": residual})


def check_inner_products(a: InnerProducts) -> None:
    _check("a", a.a, a._asdict())


def _check(name: str, first: Tensor, arguments: dict[str, Any]) -> None:
    if first.dim() != 3:
        raise invalid(name, "shape [K, m, C]", f"shape {list(first.shape)}")
    check_dtype(name, first)
    _check_layout(name, first, dense=True)
    k, m, c = first.shape
    shapes = {"KmC": (k, m, c), "mC": (m, c), "KC": (k, c), "C": (c,)}
    for argument, tensor in arguments.items():
        if argument == name or not isinstance(tensor, Tensor):
            continue
        form, _, dense = FORMS[argument].partition(" ")
        if tensor.shape != shapes[form]:
            letters = ", ".join(form)
            raise invalid(
                argument,
                f"shape [{letters}] = {list(shapes[form])} beside {name}",
                f"shape {list(tensor.shape)}",
            )
        check_like(argument, tensor, name, first)
        _check_layout(argument, tensor, dense=bool(dense))


def _check_layout(name: str, tensor: Tensor, *, dense: bool) -> None:
    if tensor.dim() < 3:
        fits, wanted = tensor.is_contiguous(), "a contiguous tensor"
    else:
        _, m, c = tensor.shape
        _, pixel, channel = tensor.stride()
        fits = (c <= 1 or channel == 1) and (m <= 1 or not dense or pixel == c)
        wanted = "channels one element apart" + (" and pixels C apart" if dense else "")
    if not fits and tensor.numel() > 0:
        raise invalid(name, wanted, layout(tensor), f"pass {name}.contiguous()")


def _check_apart(name: str, tensor: Tensor) -> None:
    """Tangents of what is written do not overlap."""
    k, m, c = tensor.shape
    if k > 1 and tensor.numel() > 0 and tensor.stride(0) < m * c:
        raise invalid(
            name,
            f"tangents that do not overlap (a stride of at least {m * c} along k)",
            layout(tensor),
            f"pass {name}.contiguous()",
        )


def _needs(arguments: Jvp | VjpTangent, name: str, needed: str) -> None:
    if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
        raise invalid(needed, f"a tensor, as {name} is given", "None")
