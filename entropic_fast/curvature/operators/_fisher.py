"""Products with the empirical Fisher matrix, and its leading eigenpairs from few passes."""

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
from ..estimators._block_lanczos import block_lanczos, require_converged
from ..estimators._krylov_basis import KrylovBasis
from ..estimators._searches import run
from ..per_example._chunks import ExampleGradients
from ._base import CurvatureOperator

logger = logging.getLogger(__name__)

# On a GPU a product takes at most so many slices of columns, and so as many launches whatever P.
SLICES = 8
# Columns beyond k in a block: convergence depends on the gap after the block's last column.
OVERSAMPLING = 5
# Blocks held before a restart; most spectra of networks need fewer.
DEPTH = 10
# Blocks beside the basis, as measured: a product, what is left of it, its factorization, and freed
# ones that malloc still holds.
WORKSPACE = 6


class FisherOperator(CurvatureOperator):
    """The empirical Fisher matrix F = S^T S / E of the scores of a point, never formed.

    A product with any number of columns is one pass over the examples, S^T (S V) / E chunk by
    chunk, with products and sums in float64. The scores are those of the objective's targets,
    for which F is the empirical matrix; with `with_sampled_labels(obj)` it estimates the true one.

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        max_examples: E, the first so many examples; None for all N.
        memory_budget: bytes for the scores of a chunk; None for a quarter of the free memory, half
            on a GPU. A product with K columns takes 8 P K bytes beside them, on a GPU a quarter of
            the scores' bytes more (or 256 MiB) for float64 copies.
        dtype: of the vectors it multiplies; None for the objective's (float32 for a model in
            half precision).

    Attributes:
        passes: passes over the examples so far.

    Raises:
        ValueError: as `ExampleGradients`; in products, as `CurvatureOperator.multiply`, and a
            NaN or infinite score.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> F = FisherOperator(obj, torch.tensor([2.0]))  # the scores are -2 and -8
    >>> F.shape, (F @ torch.tensor([1.0])).tolist()
    ((1, 1), [34.0])
    """

    name = "FisherOperator"
    takes_half = True

    def __init__(
        self,
        obj: Objective,
        theta: Tensor | None = None,
        max_examples: int | None = None,
        memory_budget: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(obj, theta)
        if not any(dtype is known for known in (None, torch.float32, torch.float64)):
            raise checks.invalid("dtype", "torch.float32 or torch.float64", checks.shown(dtype))
        if dtype is not None or obj.dtype in checks.HALF:
            self.dtype = dtype or torch.float32
        self.count = obj.count(max_examples)
        self.passes = 0
        self._gradients = ExampleGradients(obj, self.theta, memory_budget)

    def _product(self, columns: Tensor) -> Tensor:
        def own() -> Tensor:
            total = torch.zeros(columns.shape, dtype=torch.float64, device=self.device)
            for _, scores in self._gradients.local_chunks(self.count) if columns.shape[1] else ():
                _add_outer_products(scores, columns, total)
                del scores  # before the next are made
            return total

        total = self.obj.all_reduce(own, f"Fisher products of {self.count}", self.theta, columns)
        self.passes += bool(columns.shape[1])
        return total.div_(self.count).to(self.dtype)

    def __repr__(self) -> str:
        return f"{self.name}(P={self.shape[0]}, E={self.count})"


def _add_outer_products(scores: Tensor, columns: Tensor, total: Tensor) -> None:
    """total += S^T (S V) in float64, for scores S [n, P], columns V [P, K], total [P, K]."""
    n, width = len(scores), columns.shape[1]
    step = max(1, scratch_of(scores.device).products // (8 * (n + 2 * width)))
    if is_gpu(scores.device):
        step = max(step, -(-len(columns) // SLICES))
    slices = [slice(i, i + step) for i in range(0, len(columns), step)]
    weights = torch.zeros(n, width, dtype=torch.float64, device=scores.device)
    for part in slices:
        weights.addmm_(scores[:, part].double(), columns[part].double())
    for part in slices:
        total[part].addmm_(scores[:, part].double().T, weights)


@clean_dispatch_state()
def fisher_eigenvalues(
    obj: Objective,
    k: int,
    theta: Tensor | None = None,
    *,
    max_examples: int | None = None,
    tol: float = 1e-3,
    block: int | None = None,
    max_passes: int = 50,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Eigenpairs:
    """The k largest eigenpairs of the empirical Fisher matrix F = S^T S / E, for any E.

    Randomized block Lanczos (Golub and Underwood 1977; Musco and Musco, arXiv 1504.05477): a
    random block of vectors, multiplied by F again and again, spans a Krylov space in which the
    eigenpairs are sought (Rayleigh and Ritz), with full reorthogonalization in two passes and a
    thick restart when the memory is full. A product costs one pass over the examples whatever
    the block's width, so a wide block saves passes, and it finds every copy of a multiple
    eigenvalue. The residuals are those of the returned vectors to rounding, as in
    `top_eigenvalues`; a pass that computes them follows only where they are near rounding.

    This is the way for E so large that the E x E Gram matrix of `score_spectrum` does not fit
    or takes too long. Cost: passes over the examples, each of their scores and 4 P b operations
    an example; on the digits network 4 to 6 passes for k from 1 to 30. Memory: the basis,
    8 P (k + 10 b) bytes for blocks of b columns, or down to 8 P (k + b) with restarts (and so
    more passes) where the budget is smaller; 8 P 6 b bytes to work in; and a chunk of scores.
    E does not matter.

    Everything after the scores is float64. So eigenvalues far under the largest come out as
    those of the scores as computed, whose own rounding `score_spectrum_floor` bounds.

    For the eigenvalues of each layer's diagonal block see `score_spectrum(group_by=...)`, one pass
    for all; here each block would need a Krylov space and passes of its own. A layer's share of an
    eigenvector v is the squared norm of its part, `obj.split(v)`.

    Args:
        obj: an objective whose examples do not influence one another.
        k: how many, at most P. Those beyond the rank of S are 0.
        theta: the point; None for the model's own.  # [P]
        max_examples: E, the first so many examples; None for all N.
        tol: converged when each residual ||F v - lambda v|| is at most tol lambda, or at the
            rounding floor (10 eps ||F||, float64).
        block: b, columns multiplied in a pass, at least k; None for k + 5. More converge in
            fewer passes.
        max_passes: most passes over the examples; at least 2.
        seed: of the random block.
        memory_budget: bytes to stay under; None for a quarter of the free memory, half on a GPU.

    Returns:
        eigenvalues [k] descending, eigenvectors [P, k], residual norms [k], all float64;
        products with single vectors spent, and whether all converged.

    Raises:
        ValueError: k, tol, block or max_passes out of range; a budget that does not hold the
            least basis; as `FisherOperator`.

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
    checks.positive("tol", tol)
    checks.integer("max_passes", max_passes, 2)
    if block is not None and checks.integer("block", block, 1) < k:
        raise checks.invalid(
            "block",
            f"at least k = {k}, without which copies of an eigenvalue are missed",
            str(block),
            "leave it out, or ask for fewer eigenvalues",
        )
    width = min(size, k + OVERSAMPLING if block is None else block)
    obj.count(max_examples)
    budget, scratch = resolve_budget(memory_budget, obj.device), scratch_of(obj.device).products
    if is_gpu(obj.device):  # more than the copies of all scores at once is not needed
        scratch = min(scratch, 8 * size * (obj.count(max_examples) + 2 * width))
    if block is None and size <= 2 * width:  # one pass gives the matrix, two with k + 5 may not do
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
    search = block_lanczos(basis, k, "LA", tol, narrow=False, max_products=max_passes)
    pairs = run(operator, search)
    logger.info(
        "%d Fisher eigenvalues: %d passes with blocks of %d, a basis of at most %d vectors",
        *(k, operator.passes, width, capacity),
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
