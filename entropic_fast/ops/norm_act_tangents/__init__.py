"""Family `norm_act_tangents`: K tangents through normalization and activation.

Tensors [K, m, C] hold one tangent (or tangent of a gradient) for each of K directions at m pixels
of C channels. `jvp` propagates tangents forward through y -> scale y -> activation, `vjp_tangent`
the gradients' tangents backward through the same, each with every tensor of K read and written
once; `norm_act` computes the values there, `inner_products` K inner products. What is None is
left out.

Elements are computed in their own dtype. Sums over pixels are float64 from block to block of 8 kB
per tangent; within a block, on a CPU, in the tensors' dtype: of at most 32 terms for a channel, of
at most 256 for a form or an inner product. They do not depend on the number of threads. NaN and
infinity propagate as in PyTorch: a slope of 0 times infinity is NaN.

Layouts: channels one element apart everywhere; pixels C apart, except in `extra` and `b`, whose
pixels and tangents may be any distance apart (as slices of one convolution's channels-last output).
"""

from __future__ import annotations

from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op
from entropic_fast.ops.backend import register_family
from entropic_fast.ops.norm_act_tangents import checks
from entropic_fast.ops.norm_act_tangents.checks import InnerProducts, Jvp, NormAct, VjpTangent

FAMILY = "norm_act_tangents"
register_family(FAMILY)

_jvp = Op(
    FAMILY, "jvp", Jvp, name="norm_act_jvp",
    check=checks.check_jvp, results=checks.new_sums, writes=("u", "out"),
)  # fmt: skip
_vjp_tangent = Op(
    FAMILY, "vjp_tangent", VjpTangent, name="norm_act_vjp_tangent",
    check=checks.check_vjp_tangent, results=checks.new_weight_tangents, writes=("u", "out"),
)  # fmt: skip
_norm_act = Op(FAMILY, "norm_act", NormAct, check=checks.check_norm_act, results=checks.new_values)
_inner_products = Op(
    FAMILY, "inner_products", InnerProducts, name="norm_act_inner_products",
    check=checks.check_inner_products, results=checks.new_inner_products,
)  # fmt: skip


def jvp(
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
    """Tangents through a normalization and an activation: (out, sums, forms).

        y   = u + extra                                          (left in u)
        pre = scale y + tscale normal + tshift + residual
        out = slope pre
        sums[k, c] = sum over pixels of cotangent y              ([0, 0] without cotangent)
        forms[k]   = sum over pixels and channels of bend pre^2  ([0] without bend)

    With scale = weight rstd, tscale and tshift the tangents of weight and bias, normal the
    normalized input, and slope and bend the activation's first derivative and (times the gradient)
    its second. `sums` is the second-order term between an affine layer's weight and its input.

    Raises:
        ValueError: dtypes, shapes, devices or layouts that do not fit, memory that is written and
            read by two tensors, or tensors that autograd follows.

    Example:
        >>> import torch
        >>> u, ones = torch.tensor([[[1.0], [2.0]]]), torch.ones(2, 1)
        >>> out, sums, forms = jvp(u, scale=torch.tensor([3.0]), cotangent=ones, bend=ones)
        >>> out.flatten(), sums, forms
        (tensor([3., 6.]), tensor([[3.]], dtype=torch.float64), tensor([45.], dtype=torch.float64))
    """
    if out is None:
        out = u.new_empty(u.shape)
    tscale, tshift, scale = (_contiguous(t) for t in (tscale, tshift, scale))
    arguments = Jvp(u, extra, normal, scale, tscale, tshift, residual, slope, cotangent, bend, out)
    reject_autograd(**arguments._asdict())
    sums, forms = _jvp(arguments)
    return out, sums, forms


def vjp_tangent(
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
    """Gradients' tangents back through an activation and a normalization: (out, dscale, dshift).

        g   = slope (u + extra + residual)                       (left in u)
        out = scale g + tscale cotangent
        dscale[k, c] = sum over pixels of g normal + rstd cotangent ty
        dshift[k, c] = sum over pixels of g

    `residual` is the second-order term of the activation or of a branch that joins here; tscale is
    the tangent of the weight times rstd. Without scale and tscale, out = g: pass out=u to avoid a
    copy.

    Raises:
        ValueError: as `jvp`.

    Example:
        >>> import torch
        >>> u, slope = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.0], [1.0]])
        >>> scale = torch.tensor([3.0])
        >>> out, dscale, dshift = vjp_tangent(u, slope=slope, normal=slope, scale=scale)
        >>> out.flatten(), dscale, dshift
        (tensor([0., 6.]), tensor([[2.]]), tensor([[2.]]))
    """
    if out is u and not (scale is None and tscale is None):
        raise invalid("out", "memory of its own where scale or tscale is given", "u", "clone one")
    if out is None:
        out = u.new_empty(u.shape)
    scale, tscale, rstd = (_contiguous(t) for t in (scale, tscale, rstd))
    arguments = VjpTangent(
        u, extra, residual, slope, normal, scale, tscale, cotangent, ty, rstd,
        None if out is u else out,
    )  # fmt: skip
    reject_autograd(**arguments._asdict())
    dscale, dshift = _vjp_tangent(arguments)
    return out, dscale, dshift


def norm_act(
    y: Tensor,  # [m, C] float32 or float64
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # [m, C]
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [m, C] each
    """Values of a normalization and an activation: (z, normal, slope).

        normal = (y - mean) rstd
        z      = weight normal + bias + residual     (its positive part, with relu)
        slope  = 1 where that is positive, else 0    (None without relu)

    Raises:
        ValueError: as `jvp`.

    Example:
        >>> import torch
        >>> y = torch.tensor([[1.0], [4.0]])
        >>> z, normal, slope = norm_act(y, torch.tensor([2.0]), torch.tensor([0.5]), relu=True)
        >>> z.flatten(), normal.flatten(), slope.flatten()
        (tensor([0., 1.]), tensor([-0.5000,  1.0000]), tensor([0., 1.]))
    """
    arguments = NormAct(
        y, mean.contiguous(), rstd.contiguous(), _contiguous(weight), _contiguous(bias),
        residual, relu,
    )  # fmt: skip
    reject_autograd(**arguments._asdict())
    z, normal, slope = _norm_act(arguments)
    return z, normal, slope if relu else None


def inner_products(
    a: Tensor,  # [K, m, C] float32 or float64
    b: Tensor,  # [K, m, C], any strides of k and pixels
) -> Tensor:  # [K] float64
    """Inner products of K pairs of tensors, summed in float64.

    Raises:
        ValueError: as `jvp`.

    Example:
        >>> import torch
        >>> inner_products(torch.ones(2, 3, 4), torch.full((2, 3, 4), 0.5))
        tensor([6., 6.], dtype=torch.float64)
    """
    arguments = InnerProducts(a, b)
    reject_autograd(**arguments._asdict())
    return _inner_products(arguments)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
