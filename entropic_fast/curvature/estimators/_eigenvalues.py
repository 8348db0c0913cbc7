"""Extreme eigenvalues of an operator, and of the diagonal blocks of an objective's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.results import Eigenpairs
from ...objective import Objective
from .._grouping import GROUPINGS, grouping
from ..operators._algebra import OperatorBase, OperatorExpression, Product, as_operator
from ..operators._base import CurvatureOperator
from ..operators._linear_operator import LinearOperator
from ._block_lanczos import (
    COMPLETE,
    Request,
    block_lanczos,
    capacity,
    forms_matrix,
    limited_by,
    require_converged,
)
from ._krylov_basis import KrylovBasis
from ._searches import Search, run, run_blocks

WANTED = ("LA", "SA", "LM", "BE")
# Vectors of a block unless asked for: wider ones gain no more speed.
WIDEST = 8
Start: TypeAlias = Tensor | Eigenpairs


@overload
def top_eigenvalues(
    operator: LinearOperator | Tensor, k: int = 1, tol: float = 1e-3, seed: int = 0,
    max_matvecs: int = 500, which: str = "LA", v0: Start | None = None,
    block: int | None = None, *, group_by: None = None,
) -> Eigenpairs: ...  # fmt: skip


@overload
def top_eigenvalues(
    operator: LinearOperator | Tensor, k: int = 1, tol: float = 1e-3, seed: int = 0,
    max_matvecs: int = 500, which: str = "LA", v0: Mapping[str, Start] | None = None,
    block: int | None = None, *, group_by: str,
) -> dict[str, Eigenpairs]: ...  # fmt: skip


@full_precision()
def top_eigenvalues(
    operator: LinearOperator | Tensor,
    k: int = 1,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int = 500,
    which: str = "LA",
    v0: Start | Mapping[str, Start] | None = None,
    block: int | None = None,
    *,
    group_by: str | None = None,
) -> Eigenpairs | dict[str, Eigenpairs]:
    """The k extreme eigenpairs of a symmetric operator.

    Block Lanczos with full reorthogonalization in two passes, restarted with the best Ritz vectors
    when the basis is full (thick restart, Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000).
    Within a block only directions in which wanted pairs still have a residual are multiplied.
    Residual norms are those of the returned vectors to rounding; if the tolerance is not far above
    rounding (100 eps ||A||), k more products verify them.

    A block of b vectors finds b copies of a multiple eigenvalue, or all copies once the basis spans
    an invariant subspace. Where eigenvalues are known to be simple, block=1 needs the fewest
    products: for k = 8 of the Hessian of a small trained network 20 instead of 43, of which 8 at
    once may cost less each.

    A warm start, such as the pairs of a neighboring point on a path, is tested after its first
    product. Along a path of 33 points k = 1 took 5 products per point (9 from random vectors); k =
    3 took 13 by blocks and 10 with block=1 (19 and 13). A start that is an eigenvector is accepted
    even if it is not the wanted one; `tracked_eigenpairs` guards against that for k = 1.

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@`, a dense matrix too.
        k: how many, at most P.
        tol: converged when each residual is at most tol |lambda|, or at the rounding floor
            of the operator's dtype (10 eps ||A||).
        seed: of the random vectors.
        max_matvecs: most products with a vector before any that verify the residuals.
        which: "LA" the algebraically largest, "SA" the smallest, "LM" the largest in
            magnitude, "BE" both ends: the (k + 1) // 2 largest and the k // 2 smallest.
        v0: vectors to start from [P] or [P, r], or pairs found before; None for random ones.
        block: b, most vectors multiplied at once; None for k up to 8, or v0's columns if they
            are more. The first block is v0 and random vectors up to b; if v0 has more than b
            columns, every b-th are summed.
        group_by: None for the operator itself; "module" or "parameter" for its diagonal block of
            each, by name, of an objective's operator. k (or fewer, in a block of fewer parameters),
            max_matvecs and block then apply to each block, v0 holds starts by name, and columns of
            several blocks are multiplied at once.

    Returns:
        eigenvalues [k], the wanted end first (for "BE" descending), eigenvectors [P, k],
        residual norms [k], products, and whether all converged; if not, with a
        `NotConvergedWarning`. With group_by a dict of them, the vectors of a block with its own
        entries of theta, in theta's order.

    Raises:
        ValueError: an operator that is not square or not symmetric; k, tol, which, block or v0
            out of range; max_matvecs under k or b; a product that is not finite; group_by for an
            operator that is not of an objective.

    >>> import torch
    >>> pairs = top_eigenvalues(torch.diag(torch.tensor([3.0, -5.0, 1.0])), k=2)
    >>> [round(v, 4) for v in pairs.values.tolist()], pairs.converged
    ([3.0, 1.0], True)
    >>> import entropic_fast as ef
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> H = ef.HessianOperator(ef.Objective(torch.nn.Linear(1, 1), "mse", (x, 3 * x)))
    >>> pairs = top_eigenvalues(H, group_by="parameter")
    >>> {name: round(float(p.values[0]), 4) for name, p in pairs.items()}
    {'weight': 5.0, 'bias': 2.0}
    """
    operator = as_operator(operator)
    size = operator.order
    if group_by is None and checks.integer("k", k, 1) > size:
        raise checks.invalid("k", f"at most the operator's order {size}", str(k))
    checks.positive("tol", tol)
    checks.one_of("which", which, WANTED)
    if checks.integer("max_matvecs", max_matvecs, 1) < checks.integer("k", k, 1):
        raise checks.invalid("max_matvecs", f"at least k = {k}", str(max_matvecs))
    settings = _Settings(k, tol, seed, max_matvecs, which, block)
    if group_by is not None:
        return _by_group(operator, settings, v0, group_by)
    if isinstance(v0, Mapping):
        raise checks.invalid(
            "v0", "vectors or Eigenpairs", checks.describe(v0), "starts by name need group_by"
        )
    basis, search = _search(operator, settings, v0)
    pairs = run(operator, search)
    require_converged(pairs, "top_eigenvalues", limited_by(basis, max_matvecs))
    return pairs


class _Settings(NamedTuple):
    """Arguments of `top_eigenvalues`, in range but for `block`."""

    k: int
    tol: float
    seed: int
    max_matvecs: int
    which: str
    block: int | None


def _search(
    operator: OperatorBase, settings: _Settings, v0: Start | None, most: int = sys.maxsize
) -> tuple[KrylovBasis, Search[Eigenpairs]]:
    """The search for pairs of an operator, not begun, and its basis of at most `most` columns."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    k, tol, seed, max_matvecs, which, block = settings
    start = None if v0 is None else _columns(v0, size)
    if block is None:
        width = max(min(k, WIDEST), 1 if start is None else start.shape[1])
    else:
        width = checks.integer("block", block, 1)
    width = min(width, size)
    if width > max_matvecs:
        raise checks.invalid("max_matvecs", f"at least the first block's {width}", str(max_matvecs))
    room = capacity(k, width, size, dtype, device)
    if size > COMPLETE:
        room = min(room, most)
    formed = forms_matrix(k, size, max_matvecs, room)
    basis = KrylovBasis(operator, room, seed, size if formed else width)

    def search() -> Search[Eigenpairs]:
        yield from basis.form() if formed else basis.start(start)
        request = Request(k, which, tol, max_matvecs=max_matvecs)
        return (yield from block_lanczos(basis, request))

    return basis, search()


def _by_group(
    operator: OperatorBase, settings: _Settings, v0: Any, group_by: str
) -> dict[str, Eigenpairs]:
    """Pairs of the diagonal blocks of an objective's operator, by name."""
    checks.one_of("group_by", group_by, GROUPINGS)
    if not isinstance(operator, CurvatureOperator):
        raise checks.invalid(
            "operator",
            "one of an objective with group_by, such as HessianOperator(obj)",
            checks.describe(operator),
            "leave group_by out, or multiply blocks of the matrix yourself",
        )
    places = _places(operator.obj, operator.theta, grouping(group_by))
    if v0 is not None and not (isinstance(v0, Mapping) and set(v0) <= set(places)):
        raise checks.invalid(
            "v0",
            f"starts by name with group_by, of {', '.join(places)}"[:300],
            checks.describe(v0),
            "give what an earlier call returned",
        )
    size, dtype, device = operator.order, operator.dtype, operator.device
    first = min(size, settings.block or min(settings.k, WIDEST))
    # All bases are held at once, as long together as one of the whole.
    most = capacity(min(settings.k, size), first, size, dtype, device)
    operator.cache_primals()
    bases, searches = {}, {}
    for name, place in places.items():
        of_size = settings._replace(k=min(settings.k, len(place)))
        start = None if v0 is None else v0.get(name)
        bases[name], searches[name] = _search(DiagonalBlock(operator, place), of_size, start, most)
    pairs = run_blocks(operator, list(searches.values()), list(places.values()), WIDEST)
    by_name = dict(zip(places, pairs, strict=True))
    with held() as missed:
        for name, of_block in by_name.items():
            more = limited_by(bases[name], settings.max_matvecs)
            require_converged(of_block, f'block "{name}"', more)
    warn_once(missed, f'top_eigenvalues, group_by="{group_by}":')
    return by_name


def _places(obj: Objective, theta: Tensor, key: Callable[[str], str]) -> dict[str, Tensor]:
    """The entries of theta that belong to each group, ascending; groups without any left out."""
    entries: dict[str, list[Tensor]] = {}
    start = 0
    for name, values in obj.split(theta).items():
        stop = start + values.numel()
        if stop > start:
            entries.setdefault(key(name), []).append(torch.arange(start, stop, device=theta.device))
        start = stop
    return {name: torch.cat(parts) for name, parts in entries.items()}


class DiagonalBlock(OperatorExpression):
    """The block E^T A E of an operator A, for the columns E of the identity at some entries."""

    def __init__(self, operator: OperatorBase, place: Tensor) -> None:
        self.operator, self.place = operator, place
        super().__init__((len(place), len(place)), operator, [operator])

    def _combined(self, vectors: Tensor, product: Product) -> Tensor:
        return product(self.operator, self._padded(vectors))[self.place]

    def _forms(self, columns: Tensor) -> Tensor:
        return self.operator.quadratic_forms(self._padded(columns))

    def _transposed(self) -> OperatorBase:
        return DiagonalBlock(self.operator.T, self.place)

    def _padded(self, vectors: Tensor) -> Tensor:
        padded = vectors.new_zeros(self.operator.order, *vectors.shape[1:])
        padded[self.place] = vectors
        return padded


def _columns(v0: Start, size: int) -> Tensor:
    """The start as finite columns [P, r]."""
    vectors = v0.vectors if isinstance(v0, Eigenpairs) else v0
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        if len(vectors) != size or not 1 <= vectors.shape[1] <= size:
            raise checks.invalid(
                "v0", f"a tensor of shape [{size}] or [{size}, r]", checks.describe(vectors)
            )
        return checks.finite("v0", vectors).detach()
    return checks.vector("v0", vectors, size).detach()[:, None]
