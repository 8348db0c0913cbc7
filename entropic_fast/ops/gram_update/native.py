"""Family `gram_update` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.gram_update.checks import CrossUpdate, SymmetricUpdate


def symmetric_update_(a: SymmetricUpdate) -> None:
    _update(a.gram, a.rows, a.rows, a.double_products, lower=True)


def cross_update_(a: CrossUpdate) -> None:
    _update(*a, lower=False)


def _update(out: Tensor, a: Tensor, b: Tensor, double_products: bool, lower: bool) -> None:
    in_double = double_products and a.dtype == torch.float32
    native.call(
        "gram_update_in_double" if in_double else "gram_update", a,
        out, a, b, out.stride(0), a.stride(0), b.stride(0), a.shape[0], b.shape[0], a.shape[1],
        lower,
    )  # fmt: skip
