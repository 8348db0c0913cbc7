"""Arguments of family `norm_example_grads`, and what is required of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import check_contiguous, check_dtype, check_like, check_shape


class AffineGrads(NamedTuple):
    x: Tensor  # [n, S, C] float32 or float64
    g: Tensor  # [n, S, C]
    mean: Tensor  # [n or 1, S or 1, C or 1]
    rstd: Tensor  # [n or 1, S or 1, C or 1]


class BatchNormBackward(NamedTuple):
    x: Tensor  # [n, S, C] float32 or float64
    g: Tensor  # [n, S, C]
    mean: Tensor  # [C]
    rstd: Tensor  # [C]
    weight: Tensor  # [C]


def new_affine_grads(
    a: AffineGrads | BatchNormBackward,
) -> tuple[Tensor, Tensor]:  # dscale, dshift: [n, C]
    dscale = a.x.new_empty(a.x.shape[0], a.x.shape[2])
    return dscale, torch.empty_like(dscale)


def new_backward(
    a: BatchNormBackward,
) -> tuple[Tensor, Tensor, Tensor]:  # grad_x, dscale, dshift: [n, S, C], [n, C], [n, C]
    return torch.empty_like(a.x), *new_affine_grads(a)


def check_affine(a: AffineGrads) -> None:
    _check_examples(a)
    for name, tensor in (("mean", a.mean), ("rstd", a.rstd)):
        fits = tensor.dim() == 3 and all(
            size in (1, full) for size, full in zip(tensor.shape, a.x.shape, strict=True)
        )
        if not fits:
            n, s, c = a.x.shape
            expected = f"shape [{n} or 1, {s} or 1, {c} or 1]"
            raise invalid(name, expected, f"shape {list(tensor.shape)}")


def check_batch_norm(a: BatchNormBackward) -> None:
    _check_examples(a)
    for name, tensor in (("mean", a.mean), ("rstd", a.rstd), ("weight", a.weight)):
        check_shape(name, tensor, a.x.shape[2])


def check_all_contiguous(a: AffineGrads | BatchNormBackward) -> None:
    check_contiguous(**a._asdict())


def _check_examples(a: AffineGrads | BatchNormBackward) -> None:
    if a.x.dim() != 3:
        raise invalid("x", "shape [n, S, C]", f"shape {list(a.x.shape)}")
    check_dtype("x", a.x)
    if a.g.shape != a.x.shape:
        raise invalid("g", f"shape {list(a.x.shape)} as x", f"shape {list(a.g.shape)}")
    for name, tensor in a._asdict().items():
        check_like(name, tensor, "x", a.x)
