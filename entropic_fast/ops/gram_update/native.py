"""Family `gram_update` on the compiled module: C++ for CPU tensors.

Called by `entropic_fast.ops.gram_update` with checked tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropic_fast.ops import _native as native


def symmetric_update_(gram: Tensor, rows: Tensor, double_products: bool) -> None:
    _update(gram, rows, rows, double_products, True)


def cross_update_(out: Tensor, a: Tensor, b: Tensor, double_products: bool) -> None:
    _update(out, a, b, double_products, False)


def _update(out: Tensor, a: Tensor, b: Tensor, double_products: bool, lower: bool) -> None:
    module = native.module()
    if a.dtype == torch.float64:
        entry = module.gram_update_float64
    elif double_products:
        entry = module.gram_update_float32_in_double
    else:
        entry = module.gram_update_float32
    entry(
        out.data_ptr(), out.stride(0),
        a.data_ptr(), a.shape[0], a.stride(0),
        b.data_ptr(), b.shape[0], b.stride(0),
        a.shape[1], lower, native.threads(),
    )  # fmt: skip
