"""Family `gram_update`: products of score rows, added in place to a float64 Gram matrix.

The Gram matrix of E examples is built slice by slice: `symmetric_update_` adds what one slice of K
columns contributes, S S^T, to its lower triangle; `cross_update_` does the same for two different
sets of rows.

float32 rows are multiplied and summed in float32 over at most `BLOCK` columns; each such sum is
added to the float64 matrix. With u = 2^-24 the error of an entry is at most BLOCK u sum_k |a_k b_k|
for any K. In practice it is below 2 u |a| |b| / sqrt(K / BLOCK) where products have random signs,
and below 16 u |a| |b| / sqrt(K / BLOCK) where all have one sign, as on the diagonal. With
`double_products`, and for float64 rows, products and sums are float64 throughout.

Results do not depend on the number of threads, and are the same bits run after run on one backend.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from entropic_fast._utils.devices import is_gpu
from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op, no_results
from entropic_fast.ops.backend import backend_for, implementation, register_family, setting_for
from entropic_fast.ops.gram_update import checks
from entropic_fast.ops.gram_update.checks import CrossUpdate, SymmetricUpdate

FAMILY = "gram_update"
BLOCK = 256  # columns of one float32 sum
# Compute capabilities whose tensor cores multiply float64 as fast as other cores multiply float32
# (A100, H100 and H200, B200). Triton has the shape m8n8k4 alone for them, which runs at half of
# Hopper's rate, from memory; cuBLAS has all shapes, and a copy of float32 rows in float64 is read
# E / 128 times. Other GPUs have float64 at 1/2 (7.0) to 1/64 of float32's rate (8.6, 8.9, 12.0),
# with nothing to win. To be measured.
FLOAT64_TENSOR_CORES = frozenset({(8, 0), (9, 0), (10, 0)})

register_family(FAMILY)


# ---- which arithmetic a GPU has ------------------------------------------------------------------


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU."""
    return torch.cuda.get_device_capability(device)


def chosen_backend(device: torch.device, double: bool) -> str:
    """The backend for an update; `double`: with float64 products, of rows of either dtype."""
    # "reference" is cuBLAS there, where Triton would be next.
    chosen = backend_for(FAMILY, device)
    if double and chosen == "triton" and setting_for(device) == "auto" and is_gpu(device):
        return "reference" if compute_capability(device) in FLOAT64_TENSOR_CORES else chosen
    return chosen


def _module(a: SymmetricUpdate | CrossUpdate) -> ModuleType:
    out, rows, *_ = a
    chosen = chosen_backend(out.device, a.double_products or rows.dtype == torch.float64)
    usual = chosen == backend_for(FAMILY, out.device)
    return implementation(FAMILY, out.device, None if usual else chosen)


# ---- public functions ----------------------------------------------------------------------------

_symmetric_update = Op(
    FAMILY, "symmetric_update_", SymmetricUpdate, name="gram_symmetric_update_",
    check=checks.check_symmetric, results=no_results, writes=("gram",), module=_module,
)  # fmt: skip
_cross_update = Op(
    FAMILY, "cross_update_", CrossUpdate, name="gram_cross_update_",
    check=checks.check_cross, results=no_results, writes=("out",), module=_module,
)  # fmt: skip


def symmetric_update_(
    gram: Tensor,  # [E, E] float64, lower triangle updated in place
    rows: Tensor,  # [E, K] float32 or float64
    *,
    double_products: bool = False,
) -> None:
    """Adds rows @ rows.T to the lower triangle of `gram`; the strict upper one is not touched.

    Both may be column slices of wider tensors: columns contiguous, rows any distance apart.

    Raises:
        ValueError: dtypes, shapes, devices or layouts that do not fit, `gram` overlapping `rows`,
            or tensors that autograd follows.

    Example:
        >>> gram = torch.zeros(2, 2, dtype=torch.float64)
        >>> symmetric_update_(gram, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gram.tolist()
        [[5.0, 0.0], [11.0, 25.0]]
    """
    reject_autograd(gram=gram, rows=rows)
    _symmetric_update(SymmetricUpdate(gram, rows, double_products))


def cross_update_(
    out: Tensor,  # [M, N] float64, updated in place
    a: Tensor,  # [M, K] float32 or float64
    b: Tensor,  # [N, K] like a
    *,
    double_products: bool = False,
) -> None:
    """Adds a @ b.T to `out`: the block of a Gram matrix between two sets of rows.

    Layouts and errors as `symmetric_update_`.

    Example:
        >>> out = torch.zeros(1, 2, dtype=torch.float64)
        >>> cross_update_(out, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        >>> out
        tensor([[11., 17.]], dtype=torch.float64)
    """
    reject_autograd(out=out, a=a, b=b)
    _cross_update(CrossUpdate(out, a, b, double_products))
