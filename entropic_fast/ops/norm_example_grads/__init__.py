"""Family `norm_example_grads`: per-example gradients of a normalization layer's weights.

A layer computes y = (x - mean) * rstd * scale + shift. With x and the gradient g = d loss / d y as
n examples of S positions and C channels,

    dscale[e, c] = sum_s g[e, s, c] (x[e, s, c] - mean) rstd        dshift[e, c] = sum_s g[e, s, c]

and, where mean and rstd are constants (BatchNorm in evaluation mode), d loss / d x is
g * rstd * weight.

Each term is rounded as x's dtype rounds it, three times at most; sums of the terms are at least as
accurate as pairwise sums in that dtype. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops.backend import implementation, register_family

FAMILY = "norm_example_grads"
DTYPES = (torch.float32, torch.float64)

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.norm_example_grads.reference",
        "cpp": "entropic_fast.ops.norm_example_grads.native",
        "triton": "entropic_fast.ops.norm_example_grads.triton",
    },
)


# ---- public functions ----------------------------------------------------------------------------


def affine_grads(
    x: Tensor,  # [n, S, C] float32 or float64
    g: Tensor,  # [n, S, C] like x
    mean: Tensor,  # [n or 1, S or 1, C or 1] like x
    rstd: Tensor,  # [n or 1, S or 1, C or 1] like x
) -> tuple[Tensor, Tensor]:  # [n, C], [n, C]
    """Every example's gradients with respect to scale and shift: (dscale, dshift).

    mean and rstd are [1, 1, C] for BatchNorm in evaluation mode, [n, 1, C] for GroupNorm and
    InstanceNorm, [n, S, 1] for LayerNorm and RMSNorm. Layouts other than contiguous are copied.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, or tensors that autograd follows.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0]]])
        >>> affine_grads(x, torch.ones(1, 2, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5))
        (tensor([[1.]]), tensor([[2.]]))
    """
    _refuse_autograd(x=x, g=g, mean=mean, rstd=rstd)
    _check_affine(x, g, mean, rstd)
    shape = [b if a == 1 else a for a, b in zip(mean.shape, rstd.shape, strict=True)]
    dscale, dshift = torch.ops.entropic_fast.norm_affine_grads(
        x.contiguous(),
        g.contiguous(),
        mean.expand(shape).contiguous(),
        rstd.expand(shape).contiguous(),
    )
    return dscale, dshift


def batch_norm_backward(
    x: Tensor,  # [n, S, C] float32 or float64
    g: Tensor,  # [n, S, C] like x
    mean: Tensor,  # [C] like x
    rstd: Tensor,  # [C] like x
    weight: Tensor,  # [C] like x
) -> tuple[Tensor, Tensor, Tensor]:  # [n, S, C], [n, C], [n, C]
    """(grad_x, dscale, dshift) of BatchNorm in evaluation mode, reading x and g once.

    Raises:
        ValueError: as `affine_grads`.

    Example:
        >>> x, one = torch.tensor([[[1.0], [3.0]]]), torch.ones(1)
        >>> grad_x, dscale, dshift = batch_norm_backward(x, torch.ones(1, 2, 1), one, one / 2, one)
        >>> grad_x.flatten(), dscale, dshift
        (tensor([0.5000, 0.5000]), tensor([[1.]]), tensor([[2.]]))
    """
    _refuse_autograd(x=x, g=g, mean=mean, rstd=rstd, weight=weight)
    _check_batch_norm(x, g, mean, rstd, weight)
    grad_x, dscale, dshift = torch.ops.entropic_fast.norm_batch_norm_backward(
        x.contiguous(), g.contiguous(), mean.contiguous(), rstd.contiguous(), weight.contiguous()
    )
    return grad_x, dscale, dshift


# ---- registration with torch ---------------------------------------------------------------------


@torch.library.custom_op("entropic_fast::norm_affine_grads", mutates_args=())
def _affine_grads(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    _check_affine(x, g, mean, rstd)
    _check_contiguous(x=x, g=g, mean=mean, rstd=rstd)
    result: tuple[Tensor, Tensor] = implementation(FAMILY, x.device).affine_grads(x, g, mean, rstd)
    return result


@_affine_grads.register_fake
def _(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    _check_affine(x, g, mean, rstd)
    per_example = x.new_empty(x.shape[0], x.shape[2])
    return per_example, torch.empty_like(per_example)


@torch.library.custom_op("entropic_fast::norm_batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_batch_norm(x, g, mean, rstd, weight)
    _check_contiguous(x=x, g=g, mean=mean, rstd=rstd, weight=weight)
    kernels = implementation(FAMILY, x.device)
    result: tuple[Tensor, Tensor, Tensor] = kernels.batch_norm_backward(x, g, mean, rstd, weight)
    return result


@_batch_norm_backward.register_fake
def _(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_batch_norm(x, g, mean, rstd, weight)
    per_example = x.new_empty(x.shape[0], x.shape[2])
    return torch.empty_like(x), per_example, torch.empty_like(per_example)


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


def _check_examples(x: Tensor, g: Tensor, **rest: Tensor) -> None:
    if x.dim() != 3:
        raise invalid("x", "shape [n, S, C]", f"shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise invalid("x", "dtype float32 or float64", str(x.dtype), "convert it first")
    if g.shape != x.shape:
        raise invalid("g", f"shape {list(x.shape)} as x", f"shape {list(g.shape)}")
    for name, tensor in {"g": g, **rest}.items():
        if tensor.dtype != x.dtype:
            raise invalid(name, f"dtype {x.dtype} as x", str(tensor.dtype), "convert one of them")
        if tensor.device != x.device:
            raise invalid(name, f"device {x.device} as x", str(tensor.device), "move it there")


def _check_affine(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _check_examples(x, g, mean=mean, rstd=rstd)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        fits = tensor.dim() == 3 and all(
            a in (1, b) for a, b in zip(tensor.shape, x.shape, strict=True)
        )
        if not fits:
            n, s, c = x.shape
            expected = f"shape [{n} or 1, {s} or 1, {c} or 1]"
            raise invalid(name, expected, f"shape {list(tensor.shape)}")


def _check_batch_norm(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> None:
    _check_examples(x, g, mean=mean, rstd=rstd, weight=weight)
    for name, tensor in (("mean", mean), ("rstd", rstd), ("weight", weight)):
        if tuple(tensor.shape) != (x.shape[2],):
            raise invalid(name, f"shape [{x.shape[2]}]", f"shape {list(tensor.shape)}")


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            strides = f"strides {tensor.stride()} for shape {list(tensor.shape)}"
            raise invalid(name, "a contiguous tensor", strides, f"pass {name}.contiguous()")
