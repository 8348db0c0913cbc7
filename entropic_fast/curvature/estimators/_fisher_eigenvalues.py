"""Leading eigenpairs of the empirical Fisher matrix from few passes over the examples."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget, too_small
from ..._torch.torch_compile import clean_dispatch_state
from ..._utils import checks
from ..._utils.devices import is_gpu
from ..._utils.results import Eigenpairs
from ..._utils.workspace import scratch_of
from ...objective import Objective, require_objective
from ..operators._fisher import FisherOperator
from ._block_lanczos import Request, block_lanczos, require_converged
from ._krylov_basis import KrylovBasis
from ._searches import run
from ._settings import LanczosSettings

logger = logging.getLogger(__name__)

# Columns beyond k in a block: convergence depends on the gap after the block's last column.
OVERSAMPLING = 5
# Blocks held before a restart; most spectra of networks need fewer.
DEPTH = 10
# Blocks besides the basis, as measured: a product, its remainder, its factorization, and freed
# blocks that malloc still holds.
WORKSPACE = 6


@clean_dispatch_state()
def fisher_eigenvalues(
    obj: Objective,
    k: int,
    theta: Tensor | None = None,
    *,
    max_examples: int | None = None,
    lanczos: LanczosSettings = LanczosSettings(),
    max_passes: int = 50,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Eigenpairs:
    """The k largest eigenpairs of the empirical Fisher matrix F = S^T S / E, for any E.

    Randomized block Lanczos (Golub and Underwood 1977; Musco and Musco, arXiv 1504.05477) with full
    reorthogonalization in two passes and thick restarts. A product costs one pass over the
    examples, however wide the block, so a wide block saves passes and finds every copy of a
    multiple eigenvalue. Residuals are those of the returned vectors to rounding. Everything after
    the scores is float64: small eigenvalues are those of the scores as computed, whose rounding
    `score_spectrum_floor` estimates. Prefer `score_spectrum` while its E x E Gram matrix fits and
    is fast enough; it also has the eigenvalues of each layer's diagonal block (`group_by=`).

    Cost: passes over the examples, each for their scores and 4 P b operations per example; on the
    digits network 4 to 6 passes for k from 1 to 30. Memory, independent of E: 8 P (k + 10 b) bytes
    for the basis with blocks of b columns, or down to 8 P (k + b) with restarts and more passes if
    the budget is smaller; 48 P b bytes of workspace; and a chunk of scores.

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        k: how many, at most P. Those beyond the rank of S are 0.
        lanczos: tolerance, and b, the columns per pass: at least k, None for k + 5. More columns
            converge in fewer passes. `max_matvecs` is not used.
        max_passes: most passes over the examples; at least 2.
        seed: of the random block.
        memory_budget: limit in bytes; None for a quarter of the free memory, half on a GPU.

    Returns:
        eigenvalues [k] descending, eigenvectors [P, k], residual norms [k], all float64;
        the number of products with single vectors, and whether all converged.

    Raises:
        ValueError: k, block or max_passes out of range; a budget that does not hold the smallest
            basis; as `FisherOperator`.

    >>> import torch
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> obj = Objective(torch.nn.Linear(2, 1, bias=False), lambda out, y: out[:, 0], (x, x))
    >>> pairs = fisher_eigenvalues(obj, 2)  # the scores are x
    >>> [round(v, 9) for v in pairs.values.tolist()], pairs.converged
    ([4.5, 0.5], True)
    """
    require_objective(obj)
    size = obj.num_params
    if checks.integer("k", k, 1) > size:
        raise checks.invalid("k", f"at most the {size} parameters", str(k))
    checks.integer("max_passes", max_passes, 2)
    checks.instance("lanczos", lanczos, LanczosSettings)
    block = lanczos.block
    if block is not None and block < k:
        raise checks.invalid(
            "block",
            f"at least k = {k}, without which copies of an eigenvalue are missed",
            str(block),
            "leave it out, or ask for fewer eigenvalues",
        )
    width = min(size, k + OVERSAMPLING if block is None else block)
    count = obj.count(max_examples)
    budget, scratch = resolve_budget(memory_budget, obj.device), scratch_of(obj.device).products
    if is_gpu(obj.device):  # more than the copies of all scores at once is not needed
        scratch = min(scratch, 8 * size * (count + 2 * width))
    if block is None and size <= 2 * width:  # one pass forms the matrix, two may not be enough
        with contextlib.suppress(ValueError):
            _plan(size, k, size, budget, scratch)
            width = size
    capacity, left = _plan(size, k, width, budget, scratch)
    try:
        operator = FisherOperator(obj, theta, max_examples, left, dtype=torch.float64)
    except ValueError as error:
        if not str(error).startswith("memory_budget:"):
            raise
        raise ValueError(f"{error}; of the budget, the basis takes the rest") from error
    basis = KrylovBasis(operator, capacity, seed, width)
    run(operator, basis.start())
    request = Request(k, "LA", lanczos.tol, narrow=False, max_products=max_passes)
    pairs = run(operator, block_lanczos(basis, request))
    logger.info(
        "%d Fisher eigenvalues: %d passes with blocks of %d, a basis of at most %d vectors",
        k,
        operator.passes,
        width,
        capacity,
    )
    more = "max_passes" if basis.products + 1 >= max_passes and not basis.complete else ""
    require_converged(pairs, "fisher_eigenvalues", more, f"{basis.products} passes")
    # No eigenvalue is under 0, only rounding.
    return dataclasses.replace(pairs, values=pairs.values.clamp(min=0))


def _plan(size: int, k: int, width: int, budget: int, scratch: int) -> tuple[int, int]:
    """Columns of the basis, and the bytes left for the scores: a quarter or more."""
    column = 8 * size
    fixed = WORKSPACE * width * column + scratch
    least = min(size, k + width)
    capacity = (3 * budget // 4 - fixed) // column
    if capacity < least:
        raise too_small(
            -(-4 * (fixed + least * column) // 3),
            budget,
            f"{k} Fisher eigenvectors of {size} parameters with blocks of {width}",
            "give more memory, or ask for fewer eigenvalues or a narrower block",
        )
    capacity = min(size, k + DEPTH * width, capacity)
    return capacity, budget - fixed - capacity * column
