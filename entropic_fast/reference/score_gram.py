"""Updates of a float64 Gram matrix in plain PyTorch, in bounded scratch.

Checked tensors on any device; shapes and accuracy as in `entropic_fast.ops.score_gram`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # columns of one float32 sum
SCRATCH = 64 * 2**20  # bytes of any one temporary, where a single row or column block fits


def symmetric_update_(
    gram: Tensor,  # [E, E] float64, lower triangle updated
    rows: Tensor,  # [E, K]
    double_products: bool,
) -> None:
    count = rows.shape[0]
    step = max(1, min(count, SCRATCH // (8 * max(1, count))))
    for slices in _column_slices(double_products, rows):
        for start in range(0, count, step):
            own = slices[0][start : start + step]  # [I, k]
            here = gram[start : start + step]  # [I, E]
            _add_product(here[:, :start], own, slices[0][:start])
            square = here[:, start : start + step]  # [I, I], on the diagonal
            below = torch.ones_like(square, dtype=torch.bool).tril()
            square.copy_(torch.where(below, square + own @ own.T, square))


def cross_update_(
    out: Tensor,  # [M, N] float64, updated
    a: Tensor,  # [M, K]
    b: Tensor,  # [N, K]
    double_products: bool,
) -> None:
    step = max(1, SCRATCH // (8 * max(1, b.shape[0])))
    for left, right in _column_slices(double_products, a, b):
        for start in range(0, a.shape[0], step):
            _add_product(out[start : start + step], left[start : start + step], right)


def _column_slices(double_products: bool, *matrices: Tensor) -> Iterator[list[Tensor]]:
    """The same columns of every matrix, in the dtype of the products."""
    # A float32 product that torch may round to TF32 or bfloat16 inputs would not keep the bound.
    single = matrices[0].dtype == torch.float32 and _full_float32() and not double_products
    columns = matrices[0].shape[1]
    count = sum(m.shape[0] for m in matrices)
    step = BLOCK if single else max(1, SCRATCH // (8 * max(1, count)))
    for start in range(0, columns, step):
        part = [m[:, start : start + step] for m in matrices]
        yield part if single else [p.double() for p in part]


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left right^T; float32 products are converted when they are added."""
    if left.dtype == torch.float64:
        out.addmm_(left, right.T)
    else:
        out += left @ right.T


def _full_float32() -> bool:
    """Whether torch multiplies float32 matrices in full, by its settings for GPUs and for CPUs.

    `torch.get_float32_matmul_precision` raises where one of them was set by itself.
    """
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    return all(setting.fp32_precision in ("none", "ieee") for setting in settings)
