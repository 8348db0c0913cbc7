"""Family `norm_example_grads`: per-example gradients of a normalization layer's weights.

A layer computes y = (x - mean) * rstd * scale + shift. With x and the gradient g = d loss / d y as
n examples of S positions and C channels,

    dscale[e, c] = sum_s g[e, s, c] (x[e, s, c] - mean) rstd        dshift[e, c] = sum_s g[e, s, c]

and, if mean and rstd are constants (BatchNorm in evaluation mode), d loss / d x is
g * rstd * weight. Each term is rounded at most three times in x's dtype; sums are at least as
accurate as pairwise sums in that dtype, and do not depend on the number of threads.
"""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op
from entropic_fast.ops.backend import register_family
from entropic_fast.ops.norm_example_grads import checks
from entropic_fast.ops.norm_example_grads.checks import AffineGrads, BatchNormBackward

FAMILY = "norm_example_grads"
register_family(FAMILY)

_affine_grads = Op(
    FAMILY, "affine_grads", AffineGrads, name="norm_affine_grads",
    check=checks.check_affine, prepare=checks.check_all_contiguous,
    results=checks.new_affine_grads,
)  # fmt: skip
_batch_norm_backward = Op(
    FAMILY, "batch_norm_backward", BatchNormBackward, name="norm_batch_norm_backward",
    check=checks.check_batch_norm, prepare=checks.check_all_contiguous,
    results=checks.new_backward,
)  # fmt: skip


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
        >>> import torch
        >>> x = torch.tensor([[[1.0], [3.0]]])
        >>> affine_grads(x, torch.ones(1, 2, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5))
        (tensor([[1.]]), tensor([[2.]]))
    """
    arguments = AffineGrads(x, g, mean, rstd)
    reject_autograd(**arguments._asdict())
    checks.check_affine(arguments)
    shape = [b if a == 1 else a for a, b in zip(mean.shape, rstd.shape, strict=True)]
    return _affine_grads(
        AffineGrads(
            x.contiguous(),
            g.contiguous(),
            mean.expand(shape).contiguous(),
            rstd.expand(shape).contiguous(),
        )
    )


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
        >>> import torch
        >>> x, one = torch.tensor([[[1.0], [3.0]]]), torch.ones(1)
        >>> grad_x, dscale, dshift = batch_norm_backward(x, torch.ones(1, 2, 1), one, one / 2, one)
        >>> grad_x.flatten(), dscale, dshift
        (tensor([0.5000, 0.5000]), tensor([[1.]]), tensor([[2.]]))
    """
    arguments = BatchNormBackward(x, g, mean, rstd, weight)
    reject_autograd(**arguments._asdict())
    checks.check_batch_norm(arguments)
    return _batch_norm_backward(BatchNormBackward(*(t.contiguous() for t in arguments)))
