"""Family `norm_act_tangents`: K tangents through normalization and activation.

Tensors [K, m, C] hold one tangent (or tangent of a gradient) for each of K directions at m pixels
of C channels. `push` carries tangents forward through y -> scale y -> activation, `pull` carries
gradients' tangents backward through the same, each with every tensor of K read and written once;
`normalise` gives the values there, `inner` K inner products. `push` and `pull` also take what an
engine adds up on the way: sums over pixels for the weights' entries of a product, and quadratic
forms of second derivatives.

Elements are computed in their own dtype. Sums over pixels are float64 from block to block of 8 kB a
tangent; within a block, on a CPU, in the tensors' dtype: of at most 32 terms for a channel, of at
most 256 for a form or an inner product. They do not depend on the number of threads. NaN and
infinity propagate as in PyTorch: a slope of 0 times infinity is NaN. What is None takes no part.

Layouts: channels one element apart everywhere; pixels C apart, except in `extra` and `b`, whose
pixels and tangents may be any distance apart (as slices of one convolution's channels-last output).
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._dispatch import undispatched
from entropic_fast.ops.backend import implementation, register_family
from entropic_fast.ops.norm_act_tangents import checks

FAMILY = "norm_act_tangents"

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.norm_act_tangents.reference",
        "cpp": "entropic_fast.ops.norm_act_tangents.native",
        "triton": "entropic_fast.ops.norm_act_tangents.triton",
    },
    writes={"push": (0, 10), "pull": (0, 10)},
)


# ---- public functions ----------------------------------------------------------------------------


def push(
    u: Tensor,  # [K, m, C] float32 or float64, overwritten with y if extra is given
    extra: Tensor | None = None,  # [K, m, C], any strides of k and pixels
    *,
    normal: Tensor | None = None,  # [m, C]
    scale: Tensor | None = None,  # [C]
    tscale: Tensor | None = None,  # [K, C], needs normal
    tshift: Tensor | None = None,  # [K, C]
    residual: Tensor | None = None,  # [K, m, C]
    slope: Tensor | None = None,  # [m, C]
    cotangent: Tensor | None = None,  # [m, C]
    bend: Tensor | None = None,  # [m, C]
    out: Tensor | None = None,  # [K, m, C], memory for the result
) -> tuple[Tensor, Tensor, Tensor]:  # [K, m, C], [K, C] float64, [K] float64
    """Tangents through a normalisation and an activation: (out, sums, forms).

        y   = u + extra                                          (left in u)
        pre = scale y + tscale normal + tshift + residual
        out = slope pre
        sums[k, c] = sum over pixels of cotangent y              ([0, 0] without cotangent)
        forms[k]   = sum over pixels and channels of bend pre^2  ([0] without bend)

    With scale = weight rstd, tscale and tshift the tangents of weight and bias, normal the
    normalised input, and slope and bend the activation's first derivative and (times the gradient)
    its second. Of an affine layer's two second-order terms, `sums` is the one between its weight
    and its input.

    Raises:
        ValueError: dtypes, shapes, devices or layouts that do not fit, memory that is written and
            read by two tensors, or tensors that autograd follows.

    Example:
        >>> u, ones = torch.tensor([[[1.0], [2.0]]]), torch.ones(2, 1)
        >>> out, sums, forms = push(u, scale=torch.tensor([3.0]), cotangent=ones, bend=ones)
        >>> out.flatten(), sums, forms
        (tensor([3., 6.]), tensor([[3.]], dtype=torch.float64), tensor([45.], dtype=torch.float64))
    """
    checks.refuse_autograd(
        u=u, extra=extra, normal=normal, scale=scale, tscale=tscale, tshift=tshift,
        residual=residual, slope=slope, cotangent=cotangent, bend=bend, out=out,
    )  # fmt: skip
    tscale, tshift, scale = (_contiguous(t) for t in (tscale, tshift, scale))
    if out is None:
        out = u.new_empty(u.shape)
    sums, forms = undispatched(_push_operation, _push, u)(
        u, extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend, out
    )
    return out, sums, forms


def pull(
    u: Tensor,  # [K, m, C] float32 or float64, overwritten with g
    extra: Tensor | None = None,  # [K, m, C], any strides of k and pixels
    *,
    residual: Tensor | None = None,  # [K, m, C]
    slope: Tensor | None = None,  # [m, C]
    normal: Tensor | None = None,  # [m, C]
    scale: Tensor | None = None,  # [C]
    tscale: Tensor | None = None,  # [K, C], needs cotangent
    cotangent: Tensor | None = None,  # [m, C]
    ty: Tensor | None = None,  # [K, m, C], needs cotangent
    rstd: Tensor | None = None,  # [C]
    out: Tensor | None = None,  # [K, m, C], memory for the result; u itself if nothing scales it
) -> tuple[Tensor, Tensor, Tensor]:  # [K, m, C], [K, C], [K, C]
    """Gradients' tangents back through an activation and a normalisation: (out, dscale, dshift).

        g   = slope (u + extra + residual)                       (left in u)
        out = scale g + tscale cotangent
        dscale[k, c] = sum over pixels of g normal + rstd cotangent ty
        dshift[k, c] = sum over pixels of g

    `residual` is the second-order term of the activation or of a branch that joins here; tscale is
    the tangent of the weight times rstd. Without scale and tscale, out = g: pass out=u to have no
    copy made.

    Raises:
        ValueError: as `push`.

    Example:
        >>> u, slope = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.0], [1.0]])
        >>> out, dscale, dshift = pull(u, slope=slope, normal=slope, scale=torch.tensor([3.0]))
        >>> out.flatten(), dscale, dshift
        (tensor([0., 6.]), tensor([[2.]]), tensor([[2.]]))
    """
    checks.refuse_autograd(
        u=u, extra=extra, residual=residual, slope=slope, normal=normal, scale=scale,
        tscale=tscale, cotangent=cotangent, ty=ty, rstd=rstd, out=out,
    )  # fmt: skip
    if out is u and not (scale is None and tscale is None):
        raise invalid("out", "memory of its own where scale or tscale is given", "u", "clone one")
    scale, tscale, rstd = (_contiguous(t) for t in (scale, tscale, rstd))
    if out is None:
        out = u.new_empty(u.shape)
    dscale, dshift = undispatched(_pull_operation, _pull, u)(
        u, extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd,
        None if out is u else out,
    )  # fmt: skip
    return out, dscale, dshift


def normalise(
    y: Tensor,  # [m, C] float32 or float64
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # [m, C]
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [m, C] each
    """Values of a normalisation and an activation: (z, normal, slope).

        normal = (y - mean) rstd
        z      = weight normal + bias + residual     (its positive part, with relu)
        slope  = 1 where that is positive, else 0    (None without relu)

    Raises:
        ValueError: as `push`.

    Example:
        >>> y = torch.tensor([[1.0], [4.0]])
        >>> z, normal, slope = normalise(y, torch.tensor([2.0]), torch.tensor([0.5]), relu=True)
        >>> z.flatten(), normal.flatten(), slope.flatten()
        (tensor([0., 1.]), tensor([-0.5000,  1.0000]), tensor([0., 1.]))
    """
    checks.refuse_autograd(y=y, mean=mean, rstd=rstd, weight=weight, bias=bias, residual=residual)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight, bias = _contiguous(weight), _contiguous(bias)
    z, normal, slope = undispatched(_normalise_operation, _normalise, y)(
        y, mean, rstd, weight, bias, residual, relu
    )
    return z, normal, slope if relu else None


def inner(
    a: Tensor,  # [K, m, C] float32 or float64
    b: Tensor,  # [K, m, C], any strides of k and pixels
) -> Tensor:  # [K] float64
    """Inner products of K pairs of tensors, summed in float64.

    Raises:
        ValueError: as `push`.

    Example:
        >>> inner(torch.ones(2, 3, 4), torch.full((2, 3, 4), 0.5))
        tensor([6., 6.], dtype=torch.float64)
    """
    checks.refuse_autograd(a=a, b=b)
    result: Tensor = undispatched(_inner_operation, _inner, a)(a, b)
    return result


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---- registration with torch ---------------------------------------------------------------------


def _push(
    u: Tensor,
    extra: Tensor | None,
    normal: Tensor | None,
    scale: Tensor | None,
    tscale: Tensor | None,
    tshift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    cotangent: Tensor | None,
    bend: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    pieces = (extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend)
    checks.check_push(u, *pieces, out)
    checks.check_overlap({"u": u, "out": out}, dict(zip(checks.PUSH, pieces, strict=True)))
    result: tuple[Tensor, Tensor] = implementation(FAMILY, u.device).push(u, *pieces, out)
    return result


_push_operation = torch.library.custom_op(
    "entropic_fast::jet_push", _push, mutates_args=("u", "out")
)


@_push_operation.register_fake
def _(
    u: Tensor,
    extra: Tensor | None,
    normal: Tensor | None,
    scale: Tensor | None,
    tscale: Tensor | None,
    tshift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    cotangent: Tensor | None,
    bend: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    checks.check_push(
        u, extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend, out
    )
    k, _, c = u.shape
    sums = u.new_empty((0, 0) if cotangent is None else (k, c), dtype=torch.float64)
    return sums, u.new_empty(0 if bend is None else k, dtype=torch.float64)


def _pull(
    u: Tensor,
    extra: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    normal: Tensor | None,
    scale: Tensor | None,
    tscale: Tensor | None,
    cotangent: Tensor | None,
    ty: Tensor | None,
    rstd: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pieces = (extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd)
    checks.check_pull(u, *pieces, out)
    checks.check_overlap({"u": u, "out": out}, dict(zip(checks.PULL, pieces, strict=True)))
    result: tuple[Tensor, Tensor] = implementation(FAMILY, u.device).pull(u, *pieces, out)
    return result


_pull_operation = torch.library.custom_op(
    "entropic_fast::jet_pull", _pull, mutates_args=("u", "out")
)


@_pull_operation.register_fake
def _(
    u: Tensor,
    extra: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    normal: Tensor | None,
    scale: Tensor | None,
    tscale: Tensor | None,
    cotangent: Tensor | None,
    ty: Tensor | None,
    rstd: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    checks.check_pull(u, extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd, out)
    dscale = u.new_empty(u.shape[0], u.shape[2])
    return dscale, torch.empty_like(dscale)


def _normalise(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_normalise(y, mean, rstd, weight, bias, residual)
    z, normal, slope = _three_like(y, relu)
    implementation(FAMILY, y.device).normalise(
        y, mean, rstd, weight, bias, residual, z, normal, slope if relu else None
    )
    return z, normal, slope


_normalise_operation = torch.library.custom_op(
    "entropic_fast::jet_normalise", _normalise, mutates_args=()
)


@_normalise_operation.register_fake
def _(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_normalise(y, mean, rstd, weight, bias, residual)
    return _three_like(y, relu)


def _three_like(y: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    slope = y.new_empty(y.shape if relu else (0, 0))
    return y.new_empty(y.shape), y.new_empty(y.shape), slope


def _inner(a: Tensor, b: Tensor) -> Tensor:
    checks.check_inner(a, b)
    result: Tensor = implementation(FAMILY, a.device).inner(a, b)
    return result


_inner_operation = torch.library.custom_op("entropic_fast::jet_inner", _inner, mutates_args=())


@_inner_operation.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    checks.check_inner(a, b)
    return a.new_empty(a.shape[0], dtype=torch.float64)
