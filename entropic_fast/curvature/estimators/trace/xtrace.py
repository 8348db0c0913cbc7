"""XTrace: every sign vector both builds the sketch and samples the remainder.

Epperly, Tropp and Webber, *XTrace: Making the most of every sample in stochastic trace estimation*,
SIAM J. Matrix Anal. Appl. 45 (2024), algorithm 2.1. With Y = A W for sign vectors W [P, l], and
Q_i an orthonormal basis of the range of Y without its column i, the result is the mean of

    t_i = tr(Q_i^T A Q_i) + w_i^T (I - Q_i Q_i^T) A (I - Q_i Q_i^T) w_i,

each unbiased. Only the range Q of all of Y is multiplied: Q_i Q_i^T = Q (I - s_i s_i^T) Q^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...._utils.results import Estimate
from ....ops.random_bits import streams as random
from ...operators._algebra import OperatorBase, ProjectedOperator
from .._probes import BLOCK, MIN_SAMPLES, inner, precise, sign_vectors
from ._deflation import new_directions, require_room
from ._integrands import TraceIntegrand
from ._registry import Budget, Probes, TraceEstimates, trace_estimator
from .hutchinson import HutchinsonSampler, exact_trace

# A column is in the span of the others if its leverage is below 1 by more than this.
LEVERAGE_ROUNDING = 1e-6


@trace_estimator("xtrace", min_probes=2, symmetric=True)
def xtrace(
    operator: OperatorBase, integrand: TraceIntegrand, budget: Budget, probes: Probes
) -> TraceEstimates:
    """Leaves one sketched vector out at a time (Epperly, Tropp, Webber 2024).

    The most accurate where eigenvalues decay fast. Its standard error, from samples that share
    their vectors, is right for a few eigenvalues over a bulk, and up to a third too small for
    smooth spectra, or if the probes are a large share of P.
    """
    if budget.covers(len(probes.directions)):
        return exact_trace(operator, integrand, probes)
    exact = HutchinsonSampler(operator, integrand, probes)
    if exact.matvecs:
        operator = ProjectedOperator(operator, probes.directions)
    state = _State(operator, probes.seed, float(exact.deflated_trace), exact.matvecs)
    signs = budget.vectors // 2
    if budget.tol is None:
        state.grow(signs)
    else:
        state.grow(min(MIN_SAMPLES, signs))
        while state.count < signs and not precise(state.estimate(), budget.tol):
            state.grow(min(state.count + BLOCK, signs))
    estimate = state.estimate()
    return TraceEstimates([estimate], estimate)


class _State:
    """Sign vectors W [P, l], an orthonormal basis Q [P, q] of A W, and A Q [P, q]; q at most l."""

    def __init__(self, operator: OperatorBase, seed: int, exact: float, matvecs: int) -> None:
        self.exact, self.deflated = exact, matvecs
        self.operator, self.key = operator, random.fold_in(seed, "xtrace")
        self.size, self.dtype, self.device = operator.order, operator.dtype, operator.device
        self.signs = torch.zeros(self.size, 0, dtype=self.dtype, device=self.device)
        self.basis, self.images = self.signs, self.signs
        self.triangle = torch.zeros(0, 0, dtype=torch.float64)  # Q^T A W, [q, l]
        self.forms = torch.zeros(0, dtype=torch.float64)  # w^T A w, [l]

    @property
    def count(self) -> int:
        """l, the number of sign vectors."""
        return self.signs.shape[1]

    def grow(self, count: int) -> None:
        """Add sign vectors until there are `count`."""
        require_room(3 * count, self.operator)
        while self.count < count:
            indices = range(self.count, min(self.count + BLOCK, count))
            signs = sign_vectors(self.size, self.key, indices, self.dtype, self.device)
            products = self.operator @ signs
            new = new_directions(products, self.basis)
            old = self.basis.shape[1]
            self.basis = torch.cat([self.basis, new], 1)
            if new.shape[1]:
                self.images = torch.cat([self.images, self.operator @ new], 1)
            triangle = torch.zeros(self.basis.shape[1], indices.stop, dtype=torch.float64)
            triangle[:old, : indices.start] = self.triangle
            triangle[:, indices.start :] = inner(self.basis, products)
            self.triangle = triangle
            self.forms = torch.cat([self.forms, (signs.double() * products.double()).sum(0).cpu()])
            self.signs = torch.cat([self.signs, signs], 1)

    def estimate(self) -> Estimate:
        """The mean of the estimates that each leave one vector out, and its error."""
        projected = inner(self.basis, self.images)  # Q^T A Q, [q, q]
        seen = inner(self.basis, self.signs)  # Q^T W, [q, l]
        imaged = inner(self.images, self.signs)  # (A Q)^T W, [q, l]
        out = _left_out(self.triangle, torch.finfo(self.dtype).eps)  # s_i, [q, l]
        on_range = projected.trace() - (out * (projected @ out)).sum(0)
        inside = seen - out * (out * seen).sum(0)  # Q^T Q_i Q_i^T w_i
        remainder = self.forms - (inside * (self.triangle + imaged - projected @ inside)).sum(0)
        matvecs = self.count + self.basis.shape[1] + self.deflated
        return Estimate.from_samples(on_range + remainder, self.exact, matvecs=matvecs)


def _left_out(triangle: Tensor, eps: float) -> Tensor:
    """The unit direction s_i that the range of a [q, l] matrix loses without column i; or 0.

    It is orthogonal to all other columns: a column of the transposed pseudo-inverse. If the others
    span column i, its leverage is under 1, and the range loses nothing.
    """
    left, lengths, right = torch.linalg.svd(triangle, full_matrices=False)
    kept = lengths > 10 * eps * lengths.max() if len(lengths) else lengths > 0
    left, lengths, right = left[:, kept], lengths[kept], right[kept]
    leverage = right.square().sum(0)
    out: Tensor = left @ (right / lengths[:, None])
    out /= torch.linalg.vector_norm(out, dim=0).clamp(min=torch.finfo(out.dtype).tiny)
    out *= leverage > 1 - LEVERAGE_ROUNDING
    return out
