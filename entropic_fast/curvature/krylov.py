"""Extreme eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..results import Eigenpairs
from .basis import Basis, wanted_first
from .memory import resolve_budget
from .protocol import require_operator

WANTED = ("LA", "SA", "LM")
# Basis vectors held before a restart: k + 40, more than most spectra of networks need for k.
EXTRA_COLUMNS = 40


def top_eigenvalues(
    operator: Any,
    k: int = 1,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int = 500,
    which: str = "LA",
    v0: Tensor | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator.

    Lanczos with full reorthogonalisation in two passes (one leaves ghosts: copies of converged
    eigenvalues), restarted with the best Ritz vectors when the basis is full (thick restart,
    Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). The residuals are computed from
    the returned vectors by k products more, not taken from the recurrence.

    When the basis spans an invariant subspace, the search goes on with a random vector
    orthogonal to it, so further copies of a multiple eigenvalue are found then. Short of
    that, one starting vector sees one copy of each eigenvalue, as in every single-vector
    Lanczos method.

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@`, a dense matrix too.
        k: how many, at most P.
        tol: converged when each residual is at most tol |lambda|, or at the rounding floor
            of the operator's dtype (10 eps ||A||).
        seed: of the random vectors.
        max_matvecs: most products to spend before the k that verify the residuals.
        which: "LA" the algebraically largest, "SA" the smallest, "LM" the largest in
            magnitude.
        v0: starting vector; None for a random one.  # [P]

    Returns:
        eigenvalues [k], the wanted end first, eigenvectors [P, k], residual norms [k],
        products spent, and whether all converged.

    Raises:
        ValueError: an operator that is not square or not symmetric; k, tol, which or v0 out
            of range; max_matvecs under k; a product that is not finite.

    >>> import torch
    >>> pairs = top_eigenvalues(torch.diag(torch.tensor([3.0, -5.0, 1.0])), k=2)
    >>> [round(v, 4) for v in pairs.values.tolist()], pairs.converged
    ([3.0, 1.0], True)
    """
    size, dtype, device = require_operator(operator)
    if checks.whole("k", k, 1) > size:
        raise checks.fail("k", f"at most the operator's order {size}", str(k))
    checks.positive("tol", tol)
    checks.one_of("which", which, WANTED)
    if checks.whole("max_matvecs", max_matvecs, 1) < k:
        raise checks.fail("max_matvecs", f"at least k = {k}", str(max_matvecs))
    basis = Basis(operator, _capacity(k, size, dtype, device), seed)
    basis.start(v0)
    return solve(basis, k, which, tol, lambda: basis.matvecs >= max_matvecs)


def solve(basis: Basis, k: int, which: str, tol: float, spent: Callable[[], bool]) -> Eigenpairs:
    """Grow a started basis, restarting it when it is full, until its k pairs are accepted.

    The residuals are computed from the returned vectors by one product more.

    Args:
        basis: of at least k + its width columns, or as many as the operator's order.
        spent: whether no more than the verifying product may follow.
    """
    floor_eps = 10 * torch.finfo(basis.dtype).eps
    goal = tol
    while True:
        values, vectors, bounds = basis.ritz(which)
        floor = floor_eps * float(values.abs().max())
        complete = basis.size == basis.order
        if basis.size >= k:
            accepted = bool((bounds[:k] <= (goal * values[:k].abs()).clamp(min=floor)).all())
            if accepted or spent() or complete:
                pairs = _verified(basis, vectors[:, :k], which, tol, floor)
                at_floor = bool((bounds[:k] <= floor).all())
                if pairs.converged or spent() or complete or at_floor:
                    return pairs
                goal *= 0.1  # rounding made the bound optimistic: ask more of it
        if basis.full:
            keep = k + max(1, (basis.capacity - k) // 3)
            basis.restart(values, vectors, min(keep, basis.capacity - basis.next.shape[1]))
        basis.grow()


def _capacity(k: int, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Basis vectors to hold: k + 40, or what a quarter of the free memory allows."""
    fits = resolve_budget(None, device) // (size * torch.finfo(dtype).bits // 8)
    if fits < min(size, k + 2):
        raise checks.fail(
            "k", f"few enough vectors of length {size} for the free memory, at most {fits}", str(k)
        )
    return int(min(size, k + EXTRA_COLUMNS, fits))


def _verified(
    basis: Basis, coordinates: Tensor, which: str, tol: float, floor: float
) -> Eigenpairs:
    """Ritz pairs with Rayleigh quotients and residuals from products with their vectors."""
    vectors, _ = torch.linalg.qr(basis.columns[:, : basis.size] @ coordinates.to(basis.columns))
    products = basis.multiply(vectors)
    values = (vectors.double() * products.double()).sum(0)
    residuals = torch.linalg.vector_norm(products.double() - values * vectors.double(), dim=0)
    order = wanted_first(values, which)
    values, vectors, residuals = values[order], vectors[:, order], residuals[order]
    return Eigenpairs(
        values.to(basis.dtype),
        vectors,
        residuals.to(basis.dtype),
        basis.matvecs,
        bool((residuals <= (tol * values.abs()).clamp(min=floor)).all()),
    )
