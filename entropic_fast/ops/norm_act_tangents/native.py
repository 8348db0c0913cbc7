"""Family `norm_act_tangents` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.norm_act_tangents.checks import (
    InnerProducts,
    Jvp,
    NormAct,
    VjpTangent,
    new_inner_products,
    new_sums,
    new_values,
    new_weight_tangents,
)


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:
    results = new_sums(a)
    strides = a.u.stride(0), *_strides(a.extra), _strides(a.residual)[0], a.out.stride(0)
    native.call("jvp", a.u, *a.u.shape, *a, *results, *strides)
    return results


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor]:
    results = new_weight_tangents(a)
    along_k = (_strides(t)[0] for t in (a.residual, a.ty, a.out))
    native.call(
        "vjp_tangent", a.u, *a.u.shape, *a, *results, a.u.stride(0), *_strides(a.extra), *along_k
    )
    return results


def norm_act(a: NormAct) -> tuple[Tensor, Tensor, Tensor]:
    z, normal, slope = new_values(a)
    *tensors, relu = a
    written = (z, normal, slope if relu else None)
    native.call("norm_act", a.y, 1, *a.y.shape, *tensors, *written)
    return z, normal, slope


def inner_products(a: InnerProducts) -> Tensor:
    result = new_inner_products(a)
    native.call("inner_products", a.a, *a.a.shape, *a, result, a.a.stride(0), *_strides(a.b))
    return result


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Along k and pixels; those of one pixel are what they would be among more."""
    if tensor is None:
        return 0, 0
    pixel = tensor.shape[2] if tensor.shape[1] <= 1 else tensor.stride(1)
    return tensor.stride(0), pixel
