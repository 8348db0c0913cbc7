"""Extreme eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, random
from ..results import Eigenpairs
from .memory import resolve_budget
from .protocol import multiply, require_operator

WANTED = ("LA", "SA", "LM")
# Basis vectors held before a restart: k + 40, more than most spectra of networks need for k.
EXTRA_COLUMNS = 40
# Rounding does not break the symmetry of the projected matrix by this share of its scale.
ASYMMETRY = 1e-2


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
    basis = _Basis(operator, _capacity(k, size, dtype, device), seed)
    basis.start(v0)
    floor_eps = 10 * torch.finfo(dtype).eps
    goal = tol
    while True:
        values, vectors, bounds = basis.ritz(which)
        floor = floor_eps * float(values.abs().max())
        complete = basis.size == size
        if basis.size >= k:
            spent = basis.matvecs >= max_matvecs
            accepted = bool((bounds[:k] <= (goal * values[:k].abs()).clamp(min=floor)).all())
            if accepted or spent or complete:
                pairs = _verified(basis, vectors[:, :k], which, tol, floor)
                at_floor = bool((bounds[:k] <= floor).all())
                if pairs.converged or spent or complete or at_floor:
                    return pairs
                goal *= 0.1  # rounding made the bound optimistic: ask more of it
        if basis.size == basis.capacity:
            basis.restart(values, vectors, k + max(1, (basis.capacity - k) // 3))
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
    basis: _Basis, coordinates: Tensor, which: str, tol: float, floor: float
) -> Eigenpairs:
    """Ritz pairs with Rayleigh quotients and residuals from products with their vectors."""
    vectors, _ = torch.linalg.qr(basis.columns[:, : basis.size] @ coordinates.to(basis.columns))
    products = multiply(basis.operator, vectors)
    basis.matvecs += vectors.shape[1]
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


def wanted_first(values: Tensor, which: str) -> Tensor:
    """The order that puts the wanted end of the values first.  # [m]"""
    if which == "SA":
        return values.argsort()
    return (values.abs() if which == "LM" else values).argsort(descending=True)


class _Basis:
    """Orthonormal columns Q with T = Q^T A Q, and the direction that follows them.

    A Q = Q T + next couplings^T. After plain steps only the last coupling is other than zero;
    after a restart all are (T has an arrow's shape then). T is kept whole, from the
    orthogonalisation's own coefficients, so that both are one case.
    """

    def __init__(self, operator: Any, capacity: int, seed: int) -> None:
        self.operator, self.seed, self.capacity = operator, seed, capacity
        self.order, self.dtype, self.device = require_operator(operator)
        self.matvecs = self.size = self.draws = 0
        self.columns = torch.zeros(self.order, capacity, dtype=self.dtype, device=self.device)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.couplings = torch.zeros(0, dtype=torch.float64)
        self.next = self.columns[:, 0]

    def start(self, v0: Tensor | None) -> None:
        """One column: v0, or a random one."""
        vector = self._random()
        if v0 is not None:
            vector = checks.vector("v0", v0, self.order).detach().to(self.columns)
            if not bool(vector.any()):
                raise checks.fail("v0", "a vector other than zero", "all zeros")
        self.next = _unit(vector)
        self.grow()

    def grow(self) -> None:
        """Append the next direction, multiply it, and find the one after."""
        j = self.size
        self.columns[:, j] = self.next
        self.size = j + 1
        product = multiply(self.operator, self.next)
        self.matvecs += 1
        norm = _norm(product)
        rest, row = self._orthogonalise(product)
        self._require_symmetry(row[:j], norm)
        self.projected[j, : j + 1] = self.projected[: j + 1, j] = row
        self.couplings = torch.zeros(self.size, dtype=torch.float64)
        if self.size == self.order:
            return
        length = _norm(rest)
        scale = max(norm, float(self.projected.abs().max()))
        if length > 10 * torch.finfo(self.dtype).eps * scale:
            # What little is left of a product is mostly rounding: one pass more.
            direction, _ = self._orthogonalise(rest / length)
            if _norm(direction) > 0.5:
                self.next = _unit(direction)
                self.couplings[-1] = length
                return
        self.next = self._fresh()  # the columns span an invariant subspace

    def ritz(self, which: str) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values [m], their coordinates [m, m] and residual norms [m], wanted first."""
        values, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        order = wanted_first(values, which)
        vectors = vectors[:, order]
        return values[order], vectors, (self.couplings @ vectors).abs()

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Keep the first `keep` Ritz vectors, with their couplings to the next direction."""
        kept, triangle = torch.linalg.qr(self.columns @ vectors[:, :keep].to(self.columns))
        self.columns[:, :keep] = kept * triangle.diagonal().sign()
        self.projected.zero_()
        self.projected.diagonal()[:keep] = values[:keep]
        self.couplings = self.couplings @ vectors[:, :keep]
        self.size = keep
        direction, _ = self._orthogonalise(self.next)
        self.next = _unit(direction)

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a vector orthogonal to the columns, and its coordinates in them."""
        used = self.columns[:, : self.size]
        total = torch.zeros(self.size, dtype=torch.float64)
        for _ in range(2):
            coordinates = used.T @ vector
            vector = vector - used @ coordinates
            total += coordinates.double().cpu()
        return vector, total

    def _require_symmetry(self, row: Tensor, norm: float) -> None:
        """q_i^T A q_j, just computed, against q_j^T A q_i, which the couplings hold."""
        if len(row) == 0:
            return
        gap = float((row - self.couplings).abs().max())
        scale = max(norm, float(self.projected.abs().max()))
        if gap > ASYMMETRY * scale:
            raise checks.fail(
                "operator",
                "a symmetric one",
                f"v^T A w and w^T A v that differ by {gap:.3g} at a scale of {scale:.3g}",
                "symmetrise it, (A + A^T) / 2",
            )

    def _fresh(self) -> Tensor:
        """A random unit vector orthogonal to the columns."""
        while True:
            vector, _ = self._orthogonalise(self._random())
            if _norm(vector) > 1e-3:
                vector, _ = self._orthogonalise(vector / vector.norm())
                return _unit(vector)

    def _random(self) -> Tensor:
        vector = random.normal(
            (self.order,),
            random.derive(self.seed, "lanczos"),
            self.draws,
            dtype=self.dtype,
            device=self.device,
        )
        self.draws += 1
        return _unit(vector)


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm()
    return vector / length


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
