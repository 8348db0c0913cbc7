"""An orthonormal basis of a Krylov space, grown by vectors or by blocks of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, random
from .protocol import multiply, require_operator

# Rounding does not break the symmetry of the projected matrix by this share of its scale.
ASYMMETRY = 1e-2
# Numbers of the basis multiplied at once when it is rotated in place.
_ROTATED = 1 << 20


def wanted_first(values: Tensor, which: str) -> Tensor:
    """The order that puts the wanted end of the values first.  # [m]"""
    if which == "SA":
        return values.argsort()
    return (values.abs() if which == "LM" else values).argsort(descending=True)


class Basis:
    """Orthonormal columns Q with T = Q^T A Q, and the directions that follow them.

    A Q = Q T + next couplings. After plain steps only the couplings of the last block are other
    than zero; after a restart all are (T has an arrow's shape then). T is kept whole, from the
    orthogonalisation's own coefficients, so that both are one case.

    Args:
        operator: symmetric, as `require_operator` asks.
        capacity: most columns to hold.
        seed: of the random vectors.
        width: columns multiplied at once.

    Attributes:
        columns: Q in the first `size` columns.  # [P, capacity]
        next: directions that follow, orthonormal.  # [P, r], r at most width
        couplings: [r, size].
        matvecs, products: vectors multiplied, and multiplications of vectors or blocks.
    """

    def __init__(self, operator: Any, capacity: int, seed: int, width: int = 1) -> None:
        self.operator, self.seed, self.capacity = operator, seed, capacity
        self.order, self.dtype, self.device = require_operator(operator)
        self.width = min(width, self.order)
        self.matvecs = self.products = self.size = self.draws = 0
        self.columns = torch.zeros(self.order, capacity, dtype=self.dtype, device=self.device)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.couplings = torch.zeros(0, 0, dtype=torch.float64)
        self.next = self.columns[:, :0]

    def start(self, v0: Tensor | None = None) -> None:
        """The first column: v0; or a random block."""
        if v0 is None:
            self.next = self._fresh(self.width)
        else:
            vector = checks.vector("v0", v0, self.order).detach().to(self.columns)
            if not bool(vector.any()):
                raise checks.fail("v0", "a vector other than zero", "all zeros")
            self.next = (vector / vector.norm())[:, None]
        self.couplings = torch.zeros(self.next.shape[1], 0, dtype=torch.float64)
        self.grow()

    @property
    def full(self) -> bool:
        """Whether there is no room for the next directions."""
        return self.size + self.next.shape[1] > self.capacity

    def grow(self) -> None:
        """Append the next directions, multiply them, and find those after."""
        old, self.size = self.size, self.size + self.next.shape[1]
        block = self.columns[:, old : self.size]
        block.copy_(self.next)
        self.next = block[:, :0]
        product = self.multiply(block)
        norm = _norms(product).max().item()
        rest, rows = self._orthogonalise(product)
        del product
        self._require_symmetry(rows[:old], norm)
        self.projected[: self.size, old : self.size] = rows
        self.projected[old : self.size, : self.size] = rows.T
        corner = self.projected[old : self.size, old : self.size]
        corner.copy_((rows[old:] + rows[old:].T) / 2)
        scale = max(norm, float(self.projected.abs().max()))
        self.next, coupling = self._directions(rest, scale)
        if coupling.shape[0] == 0:  # the columns span an invariant subspace
            del rest
            self.next = self._fresh(min(self.width, self.order - self.size))
        self.couplings = torch.zeros(self.next.shape[1], self.size, dtype=torch.float64)
        self.couplings[: len(coupling), old:] = coupling

    def multiply(self, vectors: Tensor) -> Tensor:
        """operator @ vectors [P, r], counted."""
        product = multiply(self.operator, vectors)
        self.matvecs += vectors.shape[1]
        self.products += 1
        return product

    def ritz(self, which: str) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values [m], their coordinates [m, m] and residual norms [m], wanted first."""
        values, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        order = wanted_first(values, which)
        vectors = vectors[:, order]
        return values[order], vectors, torch.linalg.vector_norm(self.couplings @ vectors, dim=0)

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Keep the first `keep` Ritz vectors, with their couplings to the next directions."""
        used, chosen = self.columns[:, : self.size], vectors[:, :keep]
        # The columns are orthonormal up to rounding, which would grow with every restart.
        gram = (used.T @ used).double().cpu()
        factor = torch.linalg.cholesky(chosen.T @ gram @ chosen)
        turn = torch.linalg.solve_triangular(factor, chosen.T, upper=False).T.to(used)
        height = max(1, _ROTATED // self.size)
        for i in range(0, self.order, height):
            used[i : i + height, :keep] = used[i : i + height] @ turn
        self.projected.zero_()
        self.projected.diagonal()[:keep] = values[:keep]
        self.size = keep
        rest, _ = self._orthogonalise(self.next)
        self.next, triangle = torch.linalg.qr(rest)
        self.couplings = triangle.double().cpu() @ (self.couplings @ chosen)

    def _orthogonalise(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The part of vectors [P, r] orthogonal to the columns, and coordinates [m, r] in them.

        In two passes: one leaves ghosts, copies of converged eigenvalues.
        """
        used = self.columns[:, : self.size]
        coordinates = used.T @ vectors
        rest = torch.addmm(vectors, used, coordinates, alpha=-1)
        again = used.T @ rest
        rest.addmm_(used, again, alpha=-1)
        return rest, coordinates.double().cpu() + again.double().cpu()

    def _directions(self, rest: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [P, s] of rest [P, r], and its coordinates in them [s, r].

        Directions along which rest is rounding of products of norm `scale` are left out. Rest is
        overwritten.
        """
        q, triangle = torch.linalg.qr(rest)
        left, lengths, right = torch.linalg.svd(triangle.double().cpu())
        kept = lengths > 10 * torch.finfo(self.dtype).eps * scale
        # What little is left of a product is mostly rounding: one pass more.
        turned = torch.mm(q, left[:, kept].to(q), out=rest[:, : int(kept.sum())])
        del q
        directions, _ = self._orthogonalise(turned)
        sound = (_norms(directions) > 0.5).cpu()
        q, triangle = torch.linalg.qr(directions[:, sound.to(self.device)])
        coordinates = (lengths[:, None] * right)[kept][sound]
        return q, triangle.double().cpu() @ coordinates

    def _require_symmetry(self, rows: Tensor, norm: float) -> None:
        """Q^T A N [m, r], just computed, against N^T A Q, which the couplings hold."""
        if rows.numel() == 0:
            return
        gap = float((rows - self.couplings.T).abs().max())
        scale = max(norm, float(self.projected.abs().max()))
        if gap > ASYMMETRY * scale:
            raise checks.fail(
                "operator",
                "a symmetric one",
                f"v^T A w and w^T A v that differ by {gap:.3g} at a scale of {scale:.3g}",
                "symmetrise it, (A + A^T) / 2",
            )

    def _fresh(self, count: int) -> Tensor:
        """Random orthonormal directions orthogonal to the columns.  # [P, count]"""
        if count == 0:
            return self.columns[:, :0]
        while True:
            rest, _ = self._orthogonalise(self._random(count))
            rest, triangle = torch.linalg.qr(rest)
            if float(triangle.diagonal().abs().min()) > 1e-3:
                rest, _ = self._orthogonalise(rest)
                fresh: Tensor = torch.linalg.qr(rest)[0]
                return fresh

    def _random(self, count: int) -> Tensor:
        vectors = torch.empty(self.order, count, dtype=self.dtype, device=self.device)
        key = random.derive(self.seed, "lanczos")
        for column in vectors.T:
            column.copy_(random.normal((self.order,), key, self.draws, device=self.device))
            self.draws += 1
        return vectors


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
    return norms
