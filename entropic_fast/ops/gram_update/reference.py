"""Updates of a float64 Gram matrix in plain PyTorch, in bounded scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from entropic_fast._utils.devices import is_gpu
from entropic_fast._utils.workspace import scratch_of
from entropic_fast.ops.gram_update.checks import CrossUpdate, SymmetricUpdate

BLOCK = 256  # columns of one float32 sum
# On a GPU rows of a block on the diagonal, of whose products half are not wanted, are at most so
# many or a quarter of all: for 1,024 rows 3/4 of the products of the square, for 4,096 5/8.
GPU_ROWS = 512


def symmetric_update_(args: SymmetricUpdate) -> None:
    gram, rows, double_products = args
    count = rows.shape[0]
    step = max(1, min(count, scratch_of(rows.device).gram // (8 * max(1, count))))
    if is_gpu(rows.device):
        step = min(step, max(GPU_ROWS, -(-count // 4)))
    for slices in _column_slices(double_products, rows):
        for start in range(0, count, step):
            block = slices[0][start : start + step]  # [I, k]
            here = gram[start : start + step]  # [I, E]
            if start:
                _add_product(here[:, :start], block, slices[0][:start])
            # [I, I], on the diagonal
            here[:, start : start + step].add_(_product(block, block).tril_())


def cross_update_(args: CrossUpdate) -> None:
    out, a, b, double_products = args
    step = max(1, scratch_of(a.device).gram // (8 * max(1, b.shape[0])))
    for left, right in _column_slices(double_products, a, b):
        for start in range(0, a.shape[0], step):
            _add_product(out[start : start + step], left[start : start + step], right)


def _column_slices(double_products: bool, *matrices: Tensor) -> Iterator[list[Tensor]]:
    """The same columns of every matrix, in the dtype of the products."""
    # A float32 product that torch may round to TF32 or bfloat16 inputs would not keep the bound.
    single = matrices[0].dtype == torch.float32 and _full_float32() and not double_products
    columns, scratch = matrices[0].shape[1], scratch_of(matrices[0].device).gram
    count = sum(m.shape[0] for m in matrices)
    stops = [columns]
    if not single:
        step = max(1, scratch // (8 * max(1, count)))
    elif is_gpu(matrices[0].device):  # full blocks, as many at once as their products fit
        pairs = max(1, matrices[0].shape[0] * matrices[-1].shape[0])
        step = BLOCK * max(1, scratch // (4 * pairs))
        stops = [columns - columns % BLOCK, columns]
    else:
        step = BLOCK
    start = 0
    for stop in stops:
        while start < stop:
            end = min(start + step, stop)
            chosen = [m[:, start:end] for m in matrices]
            yield chosen if single else [p.double() for p in chosen]
            start = end


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left right^T; float32 products are converted when they are added."""
    if left.dtype == torch.float64:
        out.addmm_(left, right.T)
    else:
        out += _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T; of several blocks of float32 columns the float64 sum of each one's products."""
    if left.dtype == torch.float64 or left.shape[1] <= BLOCK:
        return left @ right.T
    blocks = [
        torch.unflatten(m, 1, (-1, BLOCK)).transpose(0, 1) for m in (left, right)
    ]  # [B, n, BLOCK]
    products = torch.bmm(blocks[0], blocks[1].transpose(1, 2))
    return products.sum(0, dtype=torch.float64)


def _full_float32() -> bool:
    """Whether torch multiplies float32 matrices in full, by its settings for GPUs and for CPUs."""
    # `torch.get_float32_matmul_precision` raises if one of them was set by itself.
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    return all(setting.fp32_precision in ("none", "ieee") for setting in settings)
