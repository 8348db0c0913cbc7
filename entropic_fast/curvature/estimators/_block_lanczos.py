"""Thick-restart block Lanczos: the search for extreme eigenpairs in a Krylov basis."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._torch.tall_qr import qr
from ..._utils import checks
from ..._utils.convergence import warn_not_converged
from ..._utils.results import Eigenpairs
from ._krylov_basis import ROUNDING, KrylovBasis, Ritz, wanted_first
from ._searches import Search

# Basis vectors held before a restart, beyond k: more than most spectra of networks need ...
EXTRA_COLUMNS = 40
# ... and at least this many blocks.
DEPTH = 4
# Up to this order the basis may span everything: no restart, and never more products than the
# matrix has columns. Beyond it, eigenvalues of H in every iteration take longer than restarts.
COMPLETE = 512
# Lanczos steps between two synchronizations with a GPU, which each make it idle. On the CPU
# synchronizing is free.
STRIDE = 3
# Once a residual is within this factor of its tolerance, synchronize after every step: a step too
# many costs more than the wait.
FAR = 10
# The recurrence's residuals are trusted where the tolerance is this many times their rounding.
TRUSTED = 10


def forms_matrix(k: int, size: int, max_matvecs: int, room: int) -> bool:
    """Whether P products with unit vectors cost no more than a search for k pairs.

    For k = P / 2 a search in narrower blocks took 0.7 P products where eigenvalues decay fast, and
    1.3 P where they do not.
    """
    return size <= min(2 * k, max_matvecs, room)


def limited_by(basis: KrylovBasis, max_matvecs: int) -> str:
    """The argument that ended a search without convergence; "" for rounding."""
    return "max_matvecs" if basis.matvecs >= max_matvecs and not basis.complete else ""


def require_converged(pairs: Eigenpairs, caller: str, limit: str, cost: str = "") -> None:
    """Warn if pairs are not converged, with the worst residual and the remedy.

    `limit` is the argument that ended the search, "" if the operator's rounding did.
    """
    if pairs.converged:
        return
    residuals = pairs.residuals.double().cpu()
    limits = torch.zeros_like(residuals) if pairs.limits is None else pairs.limits.to(residuals)
    missed = residuals > limits
    remedy = (
        f"raise {limit} or tol"
        if limit
        else "more products do not help, as the rest is the operator's own rounding: use float64 "
        "(obj.double()), or raise tol"
    )
    worst = int((residuals - limits).where(missed, residuals.new_tensor(-1.0)).argmax())
    warn_not_converged(
        f"{caller}: {int(missed.sum())} of {len(residuals)} eigenvalues not converged after "
        f"{cost or f'{pairs.matvecs} products'}, the worst {float(pairs.values[worst]):.6g} with "
        f"a residual of {float(residuals[worst]):.3g} against {float(limits[worst]):.3g}; {remedy}"
    )


class Request(NamedTuple):
    """What to search for, and at what cost.

    `max_matvecs` bounds the vectors multiplied before the k that may verify the pairs, and
    `max_products` all blocks. Without `narrow`, directions are multiplied even if no wanted pair
    has a residual in them: for operators whose products cost the same for any number of vectors.
    """

    k: int
    which: str
    tol: float
    narrow: bool = True
    max_matvecs: int = sys.maxsize
    max_products: int = sys.maxsize


class _Progress(NamedTuple):
    """The wanted Ritz pairs against the largest residuals accepted for each, `limits` [k].

    `floor` is a residual that is rounding for any pair; `exact` says whether the recurrence gives
    residuals accurately enough for these limits.
    """

    ritz: Ritz
    limits: Tensor
    floor: float
    exact: bool

    @property
    def missing(self) -> Tensor:
        """Which wanted pairs still have too large a residual.  # [k]"""
        return self.ritz.bounds[: len(self.limits)] > self.limits

    @property
    def converged(self) -> bool:
        return bool((self.ritz.residuals[: len(self.limits)] <= self.limits).all())

    @property
    def stagnated(self) -> bool:
        """Whether a larger basis would not reduce the residuals: they are rounding."""
        k = len(self.limits)
        bounds, skews = self.ritz.bounds[:k], self.ritz.skews[:k]
        # What the products lack in symmetry does not depend on the size of the basis. It decides
        # only once it is most of a residual: a Ritz value on its way past 0 has a limit near 0.
        hopeless = (skews > FAR * self.limits) & (bounds <= skews)
        return bool((bounds <= self.floor).all()) or bool(hopeless.any())


def block_lanczos(basis: KrylovBasis, request: Request) -> Search[Eigenpairs]:
    """Expand a started basis, restarting it when it is full, until its k pairs are accepted."""
    goal, k = request.tol, request.k
    while True:
        basis.synchronize()
        progress = _assess(basis, request, goal)
        if basis.size >= k:
            over = _is_over(basis, request, progress)
            last = basis.products >= request.max_products
            if (progress.exact or last) and not basis.complete:
                if progress.converged or over:
                    return _recurrence_pairs(basis, progress, request)
            elif over or not bool(progress.missing.any()):
                pairs = yield from _verified(basis, progress, request)
                if pairs.converged or over:
                    return pairs
                goal *= 0.1  # rounding made the residual bounds too small: ask more of them
        yield from _expand(basis, request, progress)


def _assess(basis: KrylovBasis, request: Request, goal: float) -> _Progress:
    ritz = basis.ritz(request.which)
    floor = ROUNDING * torch.finfo(basis.dtype).eps * float(ritz.values.abs().max())
    limits = (goal * ritz.values[: request.k].abs()).clamp(min=floor)
    return _Progress(ritz, limits, floor, float(limits.min()) >= TRUSTED * basis.rounding)


def _is_over(basis: KrylovBasis, request: Request, progress: _Progress) -> bool:
    """Whether more products are not allowed, or would not help."""
    reserved = 0 if progress.exact else 1  # for the product that verifies the pairs
    exhausted = (
        basis.matvecs >= request.max_matvecs or basis.products + reserved >= request.max_products
    )
    return exhausted or progress.stagnated or basis.complete


def _expand(basis: KrylovBasis, request: Request, progress: _Progress) -> Search[None]:
    """Choose the directions to multiply next, make room for them, and multiply."""
    k, missing, ritz = request.k, progress.missing, progress.ritz
    if request.narrow and basis.size >= k and bool(missing.any()):
        count = basis.rotate(ritz.vectors[:, :k][:, missing])
    else:
        count = basis.block
    count = max(1, min(count, request.max_matvecs - basis.matvecs))
    if basis.size + count > basis.capacity:
        keep = k + max(1, (basis.capacity - k) // 3)
        basis.restart(ritz, min(keep, basis.capacity - count))
    allowed = min(
        (request.max_matvecs - basis.matvecs) // count, request.max_products - basis.products
    )
    far = bool((ritz.bounds[:k][missing] > FAR * progress.limits[missing]).all())
    yield from _advance(basis, count, allowed if far and count == basis.block else 1)


def _advance(basis: KrylovBasis, count: int, most: int) -> Search[None]:
    """Multiply blocks of `count` vectors until the next synchronization, at most `most` of them."""
    room = min(basis.capacity - basis.size, basis.order - basis.held) // count
    # A good start converges after a product or two.
    steps = 1 if basis.eager or basis.products < 2 else stride_of(basis.device)
    steps = max(1, min(steps, room, most))
    if steps == 1:
        yield from basis.expand(count)
        return
    basis.snapshot()
    for _ in range(steps):
        yield from basis.expand(count, wait=False)


def stride_of(device: torch.device) -> int:
    """Lanczos steps from one synchronization to the next."""
    return 1 if device.type == "cpu" else STRIDE


def capacity(k: int, first: int, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Basis vectors to hold: enough for few restarts, within a quarter of the free memory."""
    fits = resolve_budget(None, device) // (size * torch.finfo(dtype).bits // 8) - first
    least = min(size, max(k, first) + first + 1)
    if fits < least:
        raise checks.invalid(
            "k", f"few enough vectors of length {size} for the free memory, at most {fits}", str(k)
        )
    if size <= COMPLETE:
        return int(min(size, fits))
    return int(min(size, max(k, first) + max(EXTRA_COLUMNS, DEPTH * first), fits))


def _recurrence_pairs(basis: KrylovBasis, progress: _Progress, request: Request) -> Eigenpairs:
    """Ritz pairs with the recurrence's residuals."""
    ritz, k = progress.ritz, request.k
    vectors, triangle = qr(ritz_vectors(basis, ritz, k))
    vectors *= triangle.diagonal().sign()
    return _pairs(
        basis, ritz.values[:k], vectors, ritz.residuals[:k], request.which, progress.limits
    )


def _verified(basis: KrylovBasis, progress: _Progress, request: Request) -> Search[Eigenpairs]:
    """Ritz pairs with Rayleigh quotients and residuals from products with their vectors."""
    vectors, _ = qr(ritz_vectors(basis, progress.ritz, request.k))
    if basis.complete:
        products = basis.complete_product(vectors)
    else:
        products = (yield from basis.multiplied(vectors)).double()
    values = (vectors.double() * products).sum(0)
    residuals = torch.linalg.vector_norm(products - values * vectors.double(), dim=0)
    limits = (request.tol * values.abs()).clamp(min=progress.floor)
    return _pairs(basis, values, vectors, residuals, request.which, limits)


def ritz_vectors(basis: KrylovBasis, ritz: Ritz, k: int) -> Tensor:
    """The first k Ritz vectors, orthonormal to rounding.  # [P, k]"""
    return basis.columns[:, : basis.size] @ ritz.vectors[:, :k].to(basis.columns)


def _pairs(
    basis: KrylovBasis,
    values: Tensor,
    vectors: Tensor,
    residuals: Tensor,
    which: str,
    limits: Tensor,
) -> Eigenpairs:
    """Eigenpairs in the promised order."""
    order = wanted_first(values, "LA" if which == "BE" else which)
    converged = bool((residuals <= limits).all())
    # Limits are rounded up, so that residuals that met them in float64 do in the vectors' dtype.
    loose = limits[order] * (1 + 2 * torch.finfo(vectors.dtype).eps)
    return Eigenpairs(
        values[order].to(vectors),
        vectors[:, order.to(vectors.device)],
        residuals[order].to(vectors),
        basis.matvecs,
        converged,
        loose.to(vectors),
    )
