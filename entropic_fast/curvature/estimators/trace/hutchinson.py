"""Hutchinson's estimator beside an exact part: the trace of A Q Q^T plus that of A (I - Q Q^T)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...._utils.results import Estimate
from ...operators._linear_operator import multiply, quadratic_forms, require_operator
from .._probes import BLOCK, MIN_SAMPLES, block_width, mean_estimate, precise, sign_vectors
from ._deflation import project_out

# Vectors [P, K] to numbers [K, L] that are quadratic in them, in float64 on the CPU, which over
# vectors with E v v^T = I average to L traces.
TraceIntegrand = Callable[[Tensor], Tensor]


def quadratic_form(operator: Any) -> TraceIntegrand:
    """v^T A v, which averages to the trace (L = 1)."""
    return lambda vectors: quadratic_forms(operator, vectors).cpu()[:, None]


def block_quadratic_forms(operator: Any, sizes: list[int], groups: list[int]) -> TraceIntegrand:
    """The parts of v^T (A v) in L groups of entries, which average to the blocks' traces.

    Args:
        sizes: lengths of the consecutive pieces of a vector; they sum to P.
        groups: the group of each piece, 0 to L - 1.
    """

    def integrand(vectors: Tensor) -> Tensor:
        products = multiply(operator, vectors)
        found = products.new_zeros(max(groups) + 1, vectors.shape[1], dtype=torch.float64)
        pieces = zip(
            groups, vectors.split_with_sizes(sizes), products.split_with_sizes(sizes), strict=True
        )
        for group, v, product in pieces:
            found[group] += (v.double() * product.double()).sum(0)
        return found.T.cpu()

    return integrand


class Hutchinson:
    """Samples of a measure over the directions that are not in a basis, whose part is exact.

    With u = v - Q Q^T v for signs v, E u u^T = I - Q Q^T: the measure of u averages to the trace
    of A (I - Q Q^T), that of the columns of Q sums to the trace of A Q Q^T, whatever Q is.

    Args:
        operator: as `require_operator` asks.
        measure: of the operator, `whole` or `shares`.
        seed: of the signs.
        basis: Q, orthonormal.  # [P, r]

    Attributes:
        exact: sums of the measure over the columns of Q.  # [L]
        exact_error: standard error of what was added to them, if that is not exact.
        samples: [n, L].
        spent: vectors measured so far, without the given columns of Q.
    """

    def __init__(self, operator: Any, integrand: TraceIntegrand, seed: int, basis: Tensor) -> None:
        self.size, self.dtype, self.device = require_operator(operator)
        self.width = block_width(self.size, self.dtype, self.device)
        self.integrand, self.seed = integrand, seed
        self.basis, self.deflated_trace = basis[:, :0], torch.zeros(1, dtype=torch.float64)
        self.deflated_std_error = 0.0
        self.matvecs = -basis.shape[1]
        self.deflate(basis)

    def deflate(self, columns: Tensor) -> None:
        """Put columns [P, s], orthonormal and orthogonal to the basis, into the exact part."""
        for i in range(0, columns.shape[1], self.width):
            block = columns[:, i : i + self.width].contiguous()
            self.deflated_trace = self.deflated_trace + self.integrand(block).sum(0)
        # A first basis needs no copy.
        self.basis = torch.cat([self.basis, columns], 1) if self.basis.shape[1] else columns
        self.matvecs += columns.shape[1]
        self.samples = torch.zeros(0, 1, dtype=torch.float64)

    def sample(self, count: int) -> None:
        """`count` samples more."""
        done, last = len(self.samples), len(self.samples) + count
        while done < last:
            taken = range(done, min(done + self.width, last))
            signs = sign_vectors(self.size, self.seed, taken, self.dtype, self.device)
            found = self.integrand(project_out(self.basis, signs))
            self.samples = torch.cat([self.samples, found]) if done else found
            done = taken.stop
            self.matvecs += len(taken)

    def sample_until(self, tol: float | None, most: int) -> None:
        """Samples up to `most` in all, fewer if the standard error of their sum meets tol."""
        if tol is None:
            self.sample(most - len(self.samples))
            return
        while len(self.samples) < most and not self.precise(tol):
            to_come = max(BLOCK, MIN_SAMPLES - len(self.samples))
            self.sample(min(to_come, most - len(self.samples)))

    def precise(self, tol: float) -> bool:
        """Whether samples enough show a standard error within tol of the whole's size."""
        return len(self.samples) >= MIN_SAMPLES and precise(self.total(), tol)

    def total(self) -> Estimate:
        """The whole trace; `probes` are the samples."""
        return mean_estimate(
            self.samples.sum(1), float(self.deflated_trace.sum()), self.deflated_std_error
        )

    def estimates(self) -> list[Estimate]:
        """The L traces."""
        exact = self.deflated_trace.expand(self.samples.shape[1]).tolist()
        error = self.deflated_std_error
        return [mean_estimate(s, e, error) for s, e in zip(self.samples.T, exact, strict=True)]


def exact_trace(integrand: TraceIntegrand, operator: Any, known: Tensor) -> list[Estimate]:
    """The L traces from all P unit vectors, each with what is known besides: exact."""
    size, dtype, device = require_operator(operator)
    total = known
    for start in range(0, size, BLOCK):
        units = torch.zeros(size, min(BLOCK, size - start), dtype=dtype, device=device)
        units[start : start + BLOCK].fill_diagonal_(1)
        total = total + integrand(units).sum(0)
    return [Estimate(value, 0.0, size) for value in total.tolist()]
