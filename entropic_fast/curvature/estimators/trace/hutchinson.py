"""Hutchinson's estimator, with the trace on given directions computed exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._utils.results import Estimate
from ...operators._algebra import OperatorBase
from ...operators._projection import project_out
from .._probes import BLOCK, MIN_SAMPLES, block_width, precise, sign_vectors, unit_vectors
from ._integrands import TraceIntegrand
from ._registry import Budget, Probes, TraceEstimates, trace_estimator


@trace_estimator("hutchinson", group_by=True)
def hutchinson(
    operator: OperatorBase, integrand: TraceIntegrand, budget: Budget, probes: Probes
) -> TraceEstimates:
    """The mean of v^T A v over sign vectors v (Hutchinson 1990).

    Each sample is unbiased, with variance 2 (||A||_F^2 - sum_i A_ii^2) for a symmetric A. Sign
    vectors have the least variance of all probes with independent entries.
    """
    sampler = HutchinsonSampler(operator, integrand, probes)
    sampler.sample_until(budget.tol, budget.vectors)
    return sampler.estimates()


class HutchinsonSampler:
    """Samples of an integrand on the complement of directions Q, whose own trace is exact.

    With u = v - Q Q^T v for sign vectors v, E u u^T = I - Q Q^T: the integrand of u averages to the
    trace of A (I - Q Q^T), and that of the columns of Q sums to the trace of A Q Q^T, for any Q.
    `deflated_trace` [L] is the latter and `probes.known`; `samples` is [n, L].
    """

    def __init__(self, operator: OperatorBase, integrand: TraceIntegrand, probes: Probes) -> None:
        self.size, self.dtype, self.device = operator.order, operator.dtype, operator.device
        self.width = block_width(self.size, self.dtype, self.device)
        self.integrand, self.seed = integrand, probes.seed
        self.basis, self.deflated_trace = probes.directions[:, :0], probes.known.new_zeros(1)
        self.deflated_std_error = 0.0
        self.matvecs = 0
        self.deflate(probes.directions)
        self.deflated_trace = self.deflated_trace + probes.known

    def deflate(self, columns: Tensor) -> None:
        """Add columns [P, s] to Q; they are orthonormal and orthogonal to it."""
        for i in range(0, columns.shape[1], self.width):
            block = columns[:, i : i + self.width].contiguous()
            self.deflated_trace = self.deflated_trace + self.integrand(block).sum(0)
        # A first basis needs no copy.
        self.basis = torch.cat([self.basis, columns], 1) if self.basis.shape[1] else columns
        self.matvecs += columns.shape[1]
        self.samples = torch.zeros(0, 1, dtype=torch.float64)

    def sample(self, count: int) -> None:
        """Add `count` samples."""
        done, last = len(self.samples), len(self.samples) + count
        while done < last:
            indices = range(done, min(done + self.width, last))
            signs = sign_vectors(self.size, self.seed, indices, self.dtype, self.device)
            values = self.integrand(project_out(self.basis, signs))
            self.samples = torch.cat([self.samples, values]) if done else values
            done = indices.stop
            self.matvecs += len(indices)

    def sample_until(self, tol: float | None, most: int) -> None:
        """Sample up to `most` in all, fewer if the standard error of their sum meets tol."""
        if tol is None:
            self.sample(most - len(self.samples))
            return
        while len(self.samples) < most and not self.precise(tol):
            to_come = max(BLOCK, MIN_SAMPLES - len(self.samples))
            self.sample(min(to_come, most - len(self.samples)))

    def precise(self, tol: float) -> bool:
        """Whether enough samples show a standard error within tol of the size of the trace."""
        return len(self.samples) >= MIN_SAMPLES and precise(self.total(), tol)

    def total(self) -> Estimate:
        """The trace, the sum over all blocks."""
        return self._estimate(self.samples.sum(1), float(self.deflated_trace.sum()))

    def estimates(self) -> TraceEstimates:
        """The traces of the blocks, and their sum."""
        exact = self.deflated_trace.expand(self.samples.shape[1]).tolist()
        columns = zip(self.samples.T, exact, strict=True)
        return TraceEstimates([self._estimate(s, e) for s, e in columns], self.total())

    def _estimate(self, samples: Tensor, exact: float) -> Estimate:
        return Estimate.from_samples(samples, exact, self.deflated_std_error, self.matvecs)


def exact_trace(
    operator: OperatorBase, integrand: TraceIntegrand, probes: Probes
) -> TraceEstimates:
    """The traces from all P unit vectors, without error."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    traces = probes.known
    for units in unit_vectors(size, dtype, device, BLOCK):
        traces = traces + integrand(units).sum(0)
    blocks = [Estimate(value, 0.0, size, matvecs=size) for value in traces.tolist()]
    return TraceEstimates(blocks, Estimate(float(traces.sum()), 0.0, size, matvecs=size))
