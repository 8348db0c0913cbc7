"""An orthonormal basis of a Krylov space, expanded by single vectors or by blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.tall_qr import cholesky_qr, qr
from ..._utils import checks
from ..._utils.devices import is_gpu
from ..._utils.workspace import scratch_of
from ...ops.random_bits import streams as random
from ..operators._algebra import OperatorBase, as_operator
from ..operators._linear_operator import LinearOperator, not_finite
from ._probes import column_norms
from ._searches import Search

# Asymmetry of the projected matrix, relative to its scale, that rounding does not explain.
ASYMMETRY = 1e-2
# Residuals up to this multiple of eps ||A|| count as rounding.
ROUNDING = 10


def wanted_first(values: Tensor, which: str) -> Tensor:
    """The order [m] that puts the wanted end first; "BE" alternates between both ends."""
    if which == "SA":
        return values.argsort()
    order = (values.abs() if which == "LM" else values).argsort(descending=True)
    if which != "BE":
        return order
    half = (len(order) + 1) // 2
    turns = torch.empty_like(order)
    turns[0::2], turns[1::2] = order[:half], order[half:].flip(0)
    return turns


def require_symmetry(operator: OperatorBase, gap: float, scale: float) -> None:
    """Reject an operator for which v^T A w and w^T A v differ by more than rounding.

    An operator with `symmetric = True` is accepted: the asymmetry of its products is rounding, as
    for a Hessian near 0 that is a sum of large terms, and enters the residuals.
    """
    if gap > ASYMMETRY * scale and not operator.symmetric:
        raise checks.invalid(
            "operator",
            "a symmetric one",
            f"v^T A w and w^T A v that differ by {gap:.3g} at a scale of {scale:.3g}",
            "symmetrize it, (A + A^T) / 2",
        )


class Ritz(NamedTuple):
    """Ritz pairs, wanted first; on the CPU in float64."""

    values: Tensor  # [m]
    vectors: Tensor  # [m, m], coordinates in the basis
    bounds: Tensor  # [m], residual norms if the products were symmetric
    skews: Tensor  # [m], norms of the products' asymmetric part

    @property
    def residuals(self) -> Tensor:
        """Residual norms ||A y - theta y||.  # [m]"""
        return torch.hypot(self.bounds, self.skews)


class KrylovBasis:
    """Orthonormal columns Q with A Q = [Q F] H, and the block F of directions to multiply next.

    `columns` holds Q (`size` columns), then F (`block` columns). A step is queued on the operator's
    device without waiting; `synchronize` fetches H and decides what depends on values (NaN,
    symmetry, rank, Ritz pairs). If a step lost rank or gave NaN, it returns to the last snapshot,
    and all later steps are `eager`: an operator that checks its product names the error, or uses
    autograd.
    """

    def __init__(
        self, operator: LinearOperator | Tensor, capacity: int, seed: int, width: int = 1
    ) -> None:
        operator = as_operator(operator)
        self.operator, self.seed, self.capacity = operator, seed, capacity
        self.order, self.dtype, self.device = operator.order, operator.dtype, operator.device
        operator.cache_primals()  # a search makes many products at one point
        self.width = min(width, self.order)
        self.eager = False
        self.matvecs = self.products = self.size = self.block = self.draws = 0
        held = min(self.order, capacity + self.width)
        # Columns are contiguous, so that the first few can be read without the others.
        self.columns = torch.zeros(held, self.order, dtype=self.dtype, device=self.device).T
        columns = min(self.order, capacity)
        # H, of the orthogonalization's own coefficients and not symmetrized: so A Q = [Q F] H holds
        # to rounding for any A, residuals follow from H, and asymmetry of the products is noticed.
        # After a restart it has the shape of an arrow.
        self.projected = torch.zeros(held, columns, dtype=torch.float64, device=self.device)
        self.norm = self.projected.new_zeros(())  # largest norm of a product
        self._host = torch.zeros(0, 0, dtype=torch.float64)  # H at the last synchronization
        self._scale = 0.0  # of the operator, at the last synchronization
        self._forgotten = 0.0  # norm of what restarts dropped from H
        self._ranks: list[tuple[Tensor, Tensor]] = []  # not checked yet
        self._saved: tuple[int, Tensor, Tensor] | None = None  # size, F, norm

    @property
    def held(self) -> int:
        return self.size + self.block

    def start(self, v0: Tensor | None = None) -> Search[None]:
        """Multiply the first block: v0's columns [P, r], and random ones up to the width b.

        If v0 has more than b columns, columns i, i + b, i + 2b, ... are normalized and summed.
        """
        if v0 is not None:
            unit = _unit(v0.to(self.columns))
            sums = [unit[:, i :: self.width].sum(1) for i in range(self.width)]
            folded = _unit(torch.stack(sums, 1))
            if folded.shape[1] == 0:
                raise checks.invalid("v0", "a vector other than zero", "all zeros")
            self._append(self._directions(folded, 1.0)[0])
        self._append(self._fresh(self.width - self.block))
        yield from self.expand()

    def form(self) -> Search[None]:
        """Multiply all unit vectors as the first block, so that H is the matrix itself."""
        units = torch.zeros(self.order, self.order, dtype=self.dtype, device=self.device)
        self._append(units.fill_diagonal_(1))
        yield from self.expand()

    def expand(self, count: int | None = None, wait: bool = True) -> Search[None]:
        """Multiply the first `count` directions of F (None for all), and append those that follow.

        With `wait`, the rank of the directions that follow is determined at once.
        """
        count = self.block if count is None else count
        old, held = self.size, self.held
        block = self.columns[:, old : old + count]
        product = yield from self.multiplied(block, wait)
        self.norm = torch.maximum(self.norm, column_norms(product).max())
        rest, rows = self._orthogonalize(product, held)
        del product
        self.size, self.block = old + count, held - old - count
        self.projected[:held, old : self.size] = rows
        if wait:
            following, coupling = self._following(rest)
        else:
            following, coupling, sound = self._extend(rest, wait=False)
            self._ranks.append((coupling, sound))
        del rest
        self._append(following)
        self.projected[held : self.held, old : self.size] = coupling
        if self.block == 0:  # Q spans an invariant subspace
            self._append(self._fresh(min(self.width, self.order - self.size)))

    def multiplied(self, vectors: Tensor, check: bool = True) -> Search[Tensor]:
        """operator @ vectors [P, r], counted."""
        product = yield vectors, check
        self.matvecs += vectors.shape[1]
        self.products += 1
        return product

    @property
    def complete(self) -> bool:
        """Whether Q spans the entire space, so that A = Q H Q^T."""
        return self.size == self.order

    def complete_product(self, vectors: Tensor) -> Tensor:
        """A @ vectors [P, r] in float64, without a product, of a complete basis."""
        columns = self.columns[:, : self.size].double()
        return columns @ (self._host.to(columns) @ (columns.T @ vectors.double()))

    def synchronize(self) -> None:
        """Fetch H, and check the steps since the last synchronization."""
        matrix, norm, ranks = self._fetched()
        finite = bool(torch.isfinite(matrix).all()) and norm < float("inf")
        if not finite and self._saved is None:
            raise not_finite("products")
        scale = max(norm, float(matrix.abs().max()))
        lost = not finite or any(not self._full_rank(*rank, scale) for rank in ranks)
        self._ranks.clear()
        # Steps that did not wait may have divided by rounding: undo them, and wait from now on.
        if lost and self._saved is not None:
            self.eager = True
            self.size, block, self.norm = self._saved
            self.projected[:, self.size :] = 0
            self.projected[self.size :] = 0
            self.block = 0
            self._append(block)
            self.projected[: self.held, : self.size] = self._host.to(self.device)
        else:
            self._host, self._scale = matrix, scale
            square = matrix[: self.size]  # Q^T A Q, from the products with Q
            require_symmetry(self.operator, float((square - square.T).abs().max()), scale)
        self._saved = None

    def _fetched(self) -> tuple[Tensor, float, list[tuple[Tensor, Tensor]]]:
        """H, the largest norm of a product, and the results of `_extend`, in one transfer."""
        tensors = [self.projected[: self.held, : self.size], self.norm]
        tensors += [tensor for rank in self._ranks for tensor in rank]
        # One transfer: each would wait for the device.
        flat = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
        sizes = [tensor.numel() for tensor in tensors]
        matrix, norm, *others = (
            values.view(tensor.shape)
            for values, tensor in zip(flat.split_with_sizes(sizes), tensors, strict=True)
        )
        return matrix.clone(), float(norm), list(zip(others[::2], others[1::2], strict=True))

    def snapshot(self) -> None:
        """Keep F, so that steps that do not wait can be undone; after `synchronize`."""
        block = self.columns[:, self.size : self.held].clone()
        self._saved = (self.size, block, self.norm)

    def ritz(self, which: str) -> Ritz:
        """The Ritz pairs at the last synchronization, wanted first."""
        square = self._host[: self.size]
        symmetric = (square + square.T) / 2
        values, vectors = torch.linalg.eigh(symmetric)
        order = wanted_first(values, which)
        values, vectors = values[order], vectors[:, order]
        bounds = torch.linalg.vector_norm(self._host[self.size :] @ vectors, dim=0)
        skews = torch.linalg.vector_norm((square - symmetric) @ vectors, dim=0)
        return Ritz(values, vectors, bounds, skews)

    @property
    def rounding(self) -> float:
        """Norm below which residuals are rounding."""
        return ROUNDING * torch.finfo(self.dtype).eps * self._scale + self._forgotten

    def rotate(self, vectors: Tensor) -> int:
        """Rotate F so that its first directions hold the residuals of Ritz vectors [m, r].

        Returns the number of directions to multiply next: r, or all of F.
        """
        count = vectors.shape[1]
        if count >= self.block:
            return self.block
        couplings = self._host[self.size :]
        # Of a block only the directions in which wanted pairs have a residual are then multiplied.
        rotation = torch.linalg.qr(couplings @ vectors, mode="complete")[0]  # [f, f]
        block = self.columns[:, self.size : self.held]
        block.copy_(block @ rotation.to(block))
        self._host[self.size :] = rotation.T @ couplings
        self.projected[: self.held, : self.size] = self._host.to(self.device)
        return count

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Keep the first `keep` Ritz vectors, with their couplings to F; after `synchronize`."""
        used, chosen = self.columns[:, : self.size], ritz.vectors[:, :keep]
        block = self.columns[:, self.size : self.held].clone()
        # Q is orthonormal up to rounding, which would grow with every restart: Cholesky of its Gram
        # matrix makes the rotated vectors orthonormal again.
        gram = (used.T @ used).double().cpu()
        factor = torch.linalg.cholesky(chosen.T @ gram @ chosen)
        rotation = torch.linalg.solve_triangular(factor, chosen.T, upper=False).T.to(used)
        height = max(1, scratch_of(self.device).rotated // self.size)
        for i in range(0, self.order, height):
            used[i : i + height, :keep] = used[i : i + height] @ rotation
        block, _ = self._orthogonalize(block, keep)
        block, triangle = qr(block)
        couplings = triangle.double().cpu() @ (self._host[self.size :] @ chosen)
        # The asymmetric part of H leads to the vectors dropped: from now on it counts as rounding.
        self._forgotten += float(ritz.skews[:keep].norm())
        self.size, self.block = keep, 0
        self._append(block)
        self.projected.zero_()
        self.projected.diagonal()[:keep] = ritz.values[:keep].to(self.device)
        self.projected[keep : self.held, :keep] = couplings.to(self.device)
        self._host = self.projected[: self.held, :keep].cpu().clone()

    def _append(self, directions: Tensor) -> None:
        """Append directions to F, not coupled to Q yet."""
        old = self.held
        self.block += directions.shape[1]
        self.columns[:, old : self.held] = directions

    def _orthogonalize(self, vectors: Tensor, held: int) -> tuple[Tensor, Tensor]:
        """The part of vectors [P, r] orthogonal to the first columns, and coordinates in them."""
        used = self.columns[:, :held]
        # In two passes: one leaves ghosts, copies of converged eigenvalues. The second also
        # corrects the rounding of the first one's coordinates.
        coordinates = used.T @ vectors
        rest = torch.addmm(vectors, used, coordinates, alpha=-1)
        again = used.T @ rest
        rest.addmm_(used, again, alpha=-1)
        return rest, coordinates.double() + again.double()

    def _extend(self, rest: Tensor, wait: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal directions q of rest [P, r], coordinates in them, and their soundness.

        Soundness is the least norm of a direction after one more pass of orthogonalization; 0 if a
        factorization that does not wait failed.
        """
        used = self.columns[:, : self.held]
        # A short or nearly dependent column of rest is mostly rounding: hence one more pass after
        # the factorization.
        quick = not wait and is_gpu(self.device)
        q, first, *holds = cholesky_qr(rest) if quick else qr(rest)
        q.addmm_(used, used.T @ q, alpha=-1)
        q, second, *again = cholesky_qr(q) if quick else qr(q)
        sound = second.diagonal().abs().min()
        for held in (*holds, *again):
            sound = sound * held
        return q, second.double() @ first.double(), sound

    def _full_rank(self, coupling: Tensor, sound: Tensor, scale: float) -> bool:
        """Whether the directions of `_extend` are more than rounding; waits for them."""
        lengths = torch.linalg.svdvals(coupling.cpu())
        # A direction that lost more than half of its length in one pass was mostly rounding.
        return float(lengths[-1]) > self._least(scale) and float(sound) > 0.5

    def _least(self, scale: float) -> float:
        return ROUNDING * torch.finfo(self.dtype).eps * scale

    def _following(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of rest [P, r], and its coordinates in them, without rounding."""
        scale = max(float(self.norm), float(self.projected.abs().max()))
        if self.order - self.held >= rest.shape[1]:
            q, coupling, sound = self._extend(rest, wait=True)
            if self._full_rank(coupling, sound, scale):
                return q, coupling
        return self._directions(rest, scale)

    def _directions(self, rest: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Orthonormal directions [P, s] of rest [P, r], and its coordinates in them [s, r].

        Directions along which rest is rounding of products of norm `scale` are omitted. Rest is
        overwritten.
        """
        q, triangle = qr(rest)
        left, lengths, right = torch.linalg.svd(triangle.double().cpu())
        kept = lengths > self._least(scale)
        # The small remainder of a product is mostly rounding: one more pass.
        turned = torch.mm(q, left[:, kept].to(q), out=rest[:, : int(kept.sum())])
        del q
        directions, _ = self._orthogonalize(turned, self.held)
        sound = (column_norms(directions) > 0.5).cpu()
        q, triangle = qr(directions[:, sound.to(self.device)])
        coordinates = (lengths[:, None] * right)[kept][sound]
        return q, triangle.double() @ coordinates.to(self.device)

    def _fresh(self, count: int) -> Tensor:
        """Random orthonormal directions orthogonal to Q and F.  # [P, count]"""
        if count <= 0:
            return self.columns[:, :0]
        while True:
            rest, _ = self._orthogonalize(self._random(count), self.held)
            rest, triangle = qr(rest)
            # Random vectors nearly in the span of Q and F are mostly rounding: draw again.
            if float(triangle.diagonal().abs().min()) > 1e-3:
                rest, _ = self._orthogonalize(rest, self.held)
                return qr(rest)[0]

    def _random(self, count: int) -> Tensor:
        vectors = torch.empty(self.order, count, dtype=self.dtype, device=self.device)
        key = random.fold_in(self.seed, "lanczos")
        for column in vectors.T:
            column.copy_(random.normal((self.order,), key, self.draws, device=self.device))
            self.draws += 1
        return vectors


def _unit(vectors: Tensor) -> Tensor:
    """The columns other than zero, at length 1."""
    lengths = column_norms(vectors)
    return vectors[:, lengths > 0] / lengths[lengths > 0].to(vectors)
