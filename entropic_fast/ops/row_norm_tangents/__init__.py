"""Family `row_norm_tangents`: K tangents through layer and RMS normalization.

Along rows of d numbers the layers compute y = weight n + bias with n = rstd (x - mean), where mean
and rstd = (mean of (x - mean)^2 + eps)^(-1/2) are of the row; RMS normalization has mean 0.

`jvp` propagates tangents of x, weight and bias forward, and adds up the second derivative of y that
a quadratic form needs; `vjp_tangent` propagates tangents of the gradients backward. Both read and
write each row of each tangent once, while it is in cache.

Sums along a row are computed in the tensors' dtype, in as many chains as a vector has lanes; sums
over rows are float64 between blocks of 32. Results do not depend on the number of threads.
"""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op
from entropic_fast.ops.backend import register_family
from entropic_fast.ops.row_norm_tangents import checks
from entropic_fast.ops.row_norm_tangents.checks import Jvp, VjpTangent

FAMILY = "row_norm_tangents"
register_family(FAMILY)

_jvp = Op(FAMILY, "jvp", Jvp, name="row_norm_jvp", check=checks.check_jvp, results=checks.new_jvp)
_vjp_tangent = Op(
    FAMILY, "vjp_tangent", VjpTangent, name="row_norm_vjp_tangent",
    check=checks.check_vjp_tangent, results=checks.new_vjp_tangent,
)  # fmt: skip


def jvp(
    t: Tensor,  # [K, M, d] float32 or float64
    normal: Tensor,  # [M, d]
    rstd: Tensor,  # [M]
    *,
    weight: Tensor | None = None,  # [d]
    tweight: Tensor | None = None,  # [K, d]
    tbias: Tensor | None = None,  # [K, d]
    cotangent: Tensor | None = None,  # [M, d]
    centered: bool = True,
) -> tuple[Tensor, Tensor]:  # [K, M, d], [K] float64
    """Tangents of y for tangents t of x, and <cotangent, D^2 y[a', a']> for each: (out, terms).

    Args:
        tweight, tbias: tangents of weight and bias.
        cotangent: of y; without it there are no terms.
        centered: whether the layer subtracts the mean; False for RMS normalization.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, or tensors that autograd follows.

    Example:
        >>> import torch
        >>> normal, rstd = torch.tensor([[1.0, -1.0]]), torch.ones(1)
        >>> jvp(torch.tensor([[[1.0, 1.0]]]), normal, rstd)[0]  # shifting x changes nothing
        tensor([[[0., 0.]]])
    """
    c = _contiguous
    arguments = Jvp(
        t.contiguous(), normal.contiguous(), rstd.contiguous(), c(weight), c(tweight), c(tbias),
        c(cotangent), centered,
    )  # fmt: skip
    reject_autograd(**arguments._asdict())
    return _jvp(arguments)


def vjp_tangent(
    normal: Tensor,  # [M, d] float32 or float64
    rstd: Tensor,  # [M]
    *,
    u: Tensor | None = None,  # [K, M, d]
    t: Tensor | None = None,  # [K, M, d], needs cotangent
    weight: Tensor | None = None,  # [d]
    tweight: Tensor | None = None,  # [K, d], needs cotangent
    cotangent: Tensor | None = None,  # [M, d]
    centered: bool = True,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # [K, M, d], [K, d], [K, d]
    """Tangents of the gradients in x, weight and bias: (dx, dweight, dbias).

    Args:
        u, t: tangents of y's cotangent and of x.
        tweight: tangents of the weight.
        cotangent: of y.
        centered: as in `jvp`.
        weights: whether dweight and dbias are wanted; otherwise they are empty.

    Raises:
        ValueError: as `jvp`, or no tangent at all.

    Example:
        >>> import torch
        >>> normal, rstd = torch.tensor([[1.0, -1.0]]), torch.ones(1)
        >>> vjp_tangent(normal, rstd, u=torch.tensor([[[3.0, 1.0]]]))[1:]
        (tensor([[ 3., -1.]]), tensor([[3., 1.]]))
    """
    c = _contiguous
    arguments = VjpTangent(
        normal.contiguous(), rstd.contiguous(), c(u), c(t), c(weight), c(tweight), c(cotangent),
        centered, weights,
    )  # fmt: skip
    reject_autograd(**arguments._asdict())
    return _vjp_tangent(arguments)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
