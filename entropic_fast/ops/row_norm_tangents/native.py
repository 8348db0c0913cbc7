"""Family `row_norm_tangents` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.row_norm_tangents.checks import (
    Jvp,
    VjpTangent,
    new_jvp,
    new_vjp_tangent,
    tangents_of,
)


def jvp(a: Jvp) -> tuple[Tensor, Tensor]:
    out, terms = new_jvp(a)
    *tensors, centered = a
    if out.numel() == 0:  # an empty cotangent has no address, and would count as absent
        return out, terms.zero_()
    native.call("row_norm_jvp", a.t, *a.t.shape, centered, *tensors, out, terms)
    return out, terms


def vjp_tangent(a: VjpTangent) -> tuple[Tensor, Tensor, Tensor]:
    out, dweight, dbias = results = new_vjp_tangent(a)
    native.call(
        "row_norm_vjp_tangent", a.normal, tangents_of(a), *a.normal.shape, a.centered,
        a.u, a.t, a.normal, a.rstd, a.weight, a.tweight, a.cotangent, out,
        dweight if a.weights else None, dbias if a.weights else None,
    )  # fmt: skip
    return results
