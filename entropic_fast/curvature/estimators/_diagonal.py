"""The diagonal of an operator, from products with random signs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.results import Diagonal, Eigenpairs
from ...objective import Objective
from ..operators._algebra import OperatorBase, as_operator, without_shift
from ..operators._linear_operator import LinearOperator
from ..operators._projection import project_out
from ..operators._second_order import HessianOperator
from ._probes import block_width, sign_vectors
from .trace._deflation import deflation_basis

DEFAULT_PROBES = 64


def hessian_diagonal(
    obj: Objective,
    theta: Tensor | None = None,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    *,
    deflate: Eigenpairs | Tensor | None = None,
) -> Diagonal:
    """Diagonal of the Hessian of the mean loss, estimated with random signs.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        probes, seed, deflate: as for `operator_diagonal`.

    Raises:
        ValueError: as `operator_diagonal` and `HessianOperator`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> hessian_diagonal(obj, probes=4).value.tolist()
    [5.0]
    """
    return operator_diagonal(HessianOperator(obj, theta), probes, seed, deflate=deflate)


@full_precision()
def operator_diagonal(
    operator: LinearOperator | Tensor,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    *,
    deflate: Eigenpairs | Tensor | None = None,
) -> Diagonal:
    """Diagonal of a square operator: the mean of v * (A v) over sign vectors v.

    Each sample is unbiased, entry i with variance sum_{j != i} A_ij^2 (Bekas, Kokiopoulou, Saad,
    *An estimator for the diagonal of a matrix*, Appl. Numer. Math. 57, 2007). With deflated
    directions Q the diagonal of A Q Q^T is exact, and u * (A u) for u = v - Q Q^T v averages to
    that of A (I - Q Q^T). Memory: a few vectors [P] in float64 and a block of probes.

    Args:
        operator: anything with `shape`, `dtype` and `@` on blocks [P, K]; a matrix too. Symmetric
            if directions are deflated.
        probes: number of sign vectors.
        seed: of the signs, which depend on nothing else.
        deflate: as for `operator_trace`.

    Raises:
        ValueError: an operator that is not square; probes out of range; a product that is not
            finite.

    >>> import torch
    >>> diagonal = operator_diagonal(torch.tensor([[1.0, 0.5], [0.5, 2.0]]), probes=100)
    >>> error = (diagonal.value - torch.tensor([1.0, 2.0])).abs()
    >>> bool((error < 4 * diagonal.std_error).all())
    True
    """
    operator = as_operator(operator)
    checks.integer("probes", probes, 1)
    basis = deflation_basis(deflate, operator)
    with without_shift(operator) as (sampled, shift):
        diagonal = _sampled_diagonal(sampled, probes, seed, basis)
    return Diagonal(diagonal.value + shift, diagonal.std_error, diagonal.samples)


def _sampled_diagonal(operator: OperatorBase, probes: int, seed: int, basis: Tensor) -> Diagonal:
    size, dtype, device = operator.order, operator.dtype, operator.device
    width = block_width(size, dtype, device)
    exact = torch.zeros(size, dtype=torch.float64, device=device)
    for i in range(0, basis.shape[1], width):
        columns = basis[:, i : i + width].contiguous()
        for v, product in zip(columns.T, (operator @ columns).T, strict=True):
            exact.addcmul_(v.double(), product.double())
    # Mean and sum of squared deviations, sample by sample (Welford 1962).
    mean, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    for done in range(0, probes, width):
        indices = range(done, min(done + width, probes))
        vectors = project_out(basis, sign_vectors(size, seed, indices, dtype, device))
        products = operator @ vectors
        for i, v, product in zip(indices, vectors.T, products.T, strict=True):
            sample = v.double() * product.double()
            gap = sample - mean
            mean.add_(gap, alpha=1 / (i + 1))
            squares.addcmul_(gap, sample - mean)
    # A single sample leaves 0 / 0, NaN.
    error = (squares / (probes - 1) / probes).sqrt() if probes > 1 else squares / 0
    return Diagonal(exact + mean, error, probes)
