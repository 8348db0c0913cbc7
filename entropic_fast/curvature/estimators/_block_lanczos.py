"""Thick-restart block Lanczos: the search for extreme eigenpairs in a basis."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..._torch.memory_budget import resolve_budget
from ..._torch.tall_qr import qr
from ..._utils import checks
from ..._utils.convergence import warn_not_converged
from ..._utils.results import Eigenpairs
from ._krylov_basis import ROUNDING, Basis, Ritz, wanted_first
from ._searches import Search, run

# Basis vectors held before a restart, beyond k: more than most spectra of networks need ...
EXTRA_COLUMNS = 40
# ... and no fewer than so many blocks.
DEPTH = 4
# Up to this order a basis may hold all: no restart, and never more products than the matrix has
# columns. Beyond, the eigenvalues of H at every look would take longer than restarts.
COMPLETE = 512
# A device is asked for results every so many steps, because asking makes it idle. On the CPU
# asking is free.
STRIDE = 3
# It is asked after every step once a residual is within this factor of its tolerance, because
# steps beyond what is needed cost more.
FAR = 10
# Residuals are taken from the recurrence where the tolerance is so many times its rounding.
TRUSTED = 10


def forms_matrix(k: int, size: int, max_matvecs: int, room: int) -> bool:
    """Whether P products with unit vectors are no more than a search for k pairs would take.

    For k = P / 2 a search took 0.7 P products where eigenvalues decay fast and 1.3 P where they do
    not, in narrower blocks.
    """
    return size <= min(2 * k, max_matvecs, room)


def limited_by(basis: Basis, max_matvecs: int) -> str:
    """What ended a search that did not converge; "" for rounding."""
    return "max_matvecs" if basis.matvecs >= max_matvecs and not basis.complete else ""


def require_converged(pairs: Eigenpairs, what: str, more: str, spent: str = "") -> None:
    """Warn of pairs that are not converged, with the worst residual and what to do.

    Args:
        what: the function that the user called.
        more: the argument that ended the search, "" if the operator's rounding did.
        spent: on the search, if not its products.
    """
    if pairs.converged:
        return
    residuals = pairs.residuals.double().cpu()
    limits = torch.zeros_like(residuals) if pairs.limits is None else pairs.limits.to(residuals)
    missed = residuals > limits
    do = (
        f"raise {more} or tol"
        if more
        else "more products do not help, as the rest is the operator's own rounding: use float64 "
        "(obj.double()), or raise tol"
    )
    worst = int((residuals - limits).where(missed, residuals.new_tensor(-1.0)).argmax())
    warn_not_converged(
        f"{what}: {int(missed.sum())} of {len(residuals)} eigenvalues not converged after "
        f"{spent or f'{pairs.matvecs} products'}, the worst {float(pairs.values[worst]):.6g} with "
        f"a residual of {float(residuals[worst]):.3g} against {float(limits[worst]):.3g}; {do}"
    )


def solve(
    basis: Basis,
    k: int,
    which: str,
    tol: float,
    *,
    narrow: bool = True,
    max_matvecs: int = sys.maxsize,
    max_products: int = sys.maxsize,
) -> Eigenpairs:
    """`solving` with the basis's own operator."""
    search = solving(
        basis, k, which, tol, narrow=narrow, max_matvecs=max_matvecs, max_products=max_products
    )
    return run(basis.operator, search)


def solving(
    basis: Basis,
    k: int,
    which: str,
    tol: float,
    *,
    narrow: bool = True,
    max_matvecs: int = sys.maxsize,
    max_products: int = sys.maxsize,
) -> Search[Eigenpairs]:
    """Grow a started basis, restarting it when it is full, until its k pairs are accepted.

    Args:
        basis: of at least k + its width columns, or as many as the operator's order.
        narrow: whether to multiply only directions in which wanted pairs have a residual; not
            where a product costs the same for any number of vectors.
        max_matvecs: most vectors to multiply before the k that may follow to verify the pairs.
        max_products: most blocks of vectors to multiply, those included.
    """
    goal = tol
    while True:
        basis.look()
        ritz = basis.ritz(which)
        floor = ROUNDING * torch.finfo(basis.dtype).eps * float(ritz.values.abs().max())
        limits = (goal * ritz.values[:k].abs()).clamp(min=floor)
        missing = ritz.bounds[:k] > limits
        if basis.size >= k:
            at_floor = bool((ritz.bounds[:k] <= floor).all())
            exact = float(limits.min()) >= TRUSTED * basis.rounding
            last = basis.products >= max_products
            spent = last or basis.matvecs >= max_matvecs
            if not exact:  # leave one to verify
                spent = spent or basis.products + 1 >= max_products
            noisy = bool((ritz.skews[:k] > FAR * limits).any())  # which growth does not mend
            over = spent or at_floor or noisy or basis.complete
            if (exact or last) and not basis.complete:
                converged = bool((ritz.residuals[:k] <= limits).all())
                if converged or over:
                    return _returned(basis, ritz, k, which, limits)
            elif over or not bool(missing.any()):
                pairs = yield from _verified(basis, ritz, k, which, tol, floor)
                if pairs.converged or over:
                    return pairs
                goal *= 0.1  # rounding made the bound optimistic: ask more of it
        if narrow and basis.size >= k and bool(missing.any()):
            count = basis.turn(ritz.vectors[:, :k][:, missing])
        else:
            count = basis.frontier
        count = max(1, min(count, max_matvecs - basis.matvecs))
        if basis.size + count > basis.capacity:
            keep = k + max(1, (basis.capacity - k) // 3)
            basis.restart(ritz, min(keep, basis.capacity - count))
        most = min((max_matvecs - basis.matvecs) // count, max_products - basis.products)
        far = bool((ritz.bounds[:k][missing] > FAR * limits[missing]).all())
        yield from _advance(basis, count, most if far and count == basis.frontier else 1)


def _advance(basis: Basis, count: int, most: int) -> Search[None]:
    """Multiply blocks of `count` vectors until the next look, `most` of them or one."""
    room = min(basis.capacity - basis.size, basis.order - basis.held) // count
    # A good start is done after a product or two.
    steps = 1 if basis.careful or basis.products < 2 else stride_of(basis.device)
    steps = max(1, min(steps, room, most))
    if steps == 1:
        yield from basis.growing(count)
        return
    basis.remember()
    for _ in range(steps):
        yield from basis.growing(count, wait=False)


def stride_of(device: torch.device) -> int:
    """Steps from a look at the results to the next."""
    return 1 if device.type == "cpu" else STRIDE


def capacity(k: int, first: int, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Basis vectors to hold: enough for few restarts, or what the free memory allows.

    A quarter of it holds them and a block that follows.
    """
    fits = resolve_budget(None, device) // (size * torch.finfo(dtype).bits // 8) - first
    least = min(size, max(k, first) + first + 1)
    if fits < least:
        raise checks.invalid(
            "k", f"few enough vectors of length {size} for the free memory, at most {fits}", str(k)
        )
    if size <= COMPLETE:
        return int(min(size, fits))
    return int(min(size, max(k, first) + max(EXTRA_COLUMNS, DEPTH * first), fits))


def _returned(basis: Basis, ritz: Ritz, k: int, which: str, limits: Tensor) -> Eigenpairs:
    """Ritz pairs with the recurrence's residuals."""
    vectors, triangle = qr(ritz_vectors(basis, ritz, k))
    vectors *= triangle.diagonal().sign()
    values, residuals = ritz.values[:k], ritz.residuals[:k]
    return _pairs(basis, values, vectors, residuals, which, limits)


def _verified(
    basis: Basis, ritz: Ritz, k: int, which: str, tol: float, floor: float
) -> Search[Eigenpairs]:
    """Ritz pairs with Rayleigh quotients and residuals from products with their vectors."""
    vectors, _ = qr(ritz_vectors(basis, ritz, k))
    if basis.complete:  # all products are known
        products = basis.known_product(vectors)
    else:
        products = (yield from basis.multiplied(vectors)).double()
    values = (vectors.double() * products).sum(0)
    residuals = torch.linalg.vector_norm(products - values * vectors.double(), dim=0)
    limits = (tol * values.abs()).clamp(min=floor)
    return _pairs(basis, values, vectors, residuals, which, limits)


def ritz_vectors(basis: Basis, ritz: Ritz, k: int) -> Tensor:
    """The first k Ritz vectors, orthonormal to rounding.  # [P, k]"""
    return basis.columns[:, : basis.size] @ ritz.vectors[:, :k].to(basis.columns)


def _pairs(
    basis: Basis, values: Tensor, vectors: Tensor, residuals: Tensor, which: str, limits: Tensor
) -> Eigenpairs:
    """Eigenpairs in the order promised."""
    order = wanted_first(values, "LA" if which == "BE" else which)
    converged = bool((residuals <= limits).all())
    # Limits are rounded up, so that what met them in float64 does in the vectors' dtype.
    loose = limits[order] * (1 + 2 * torch.finfo(vectors.dtype).eps)
    return Eigenpairs(
        values[order].to(vectors),
        vectors[:, order.to(vectors.device)],
        residuals[order].to(vectors),
        basis.matvecs,
        converged,
        loose.to(vectors),
    )
