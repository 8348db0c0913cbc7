"""Hutch++: the trace on the range of a random sketch exactly, the remainder by Hutchinson's.

Meyer, Musco, Musco and Woodruff, *Hutch++: Optimal stochastic trace estimation*, SOSA 2021,
algorithm 1. An error of eps times the trace of a positive semi-definite matrix takes some 1 / eps
products, where Hutchinson's estimator takes 1 / eps^2.
"""

from __future__ import annotations

from ....ops.random_bits import streams as random
from ...operators._algebra import OperatorBase
from .._probes import BLOCK, MIN_SAMPLES, sign_vectors
from ._deflation import new_directions, require_room
from ._integrands import TraceIntegrand
from ._registry import Budget, Probes, TraceEstimates, trace_estimator
from .hutchinson import HutchinsonSampler, exact_trace

# One vector each for the sketch, its range, and the remainder.
THIRDS = 3


@trace_estimator("hutch++", min_probes=THIRDS, group_by=True, symmetric=True)
def hutchpp(
    operator: OperatorBase, integrand: TraceIntegrand, budget: Budget, probes: Probes
) -> TraceEstimates:
    """A third of the vectors sketches the range of A, whose trace is exact (Meyer et al. 2021).

    A third multiplies that range, and the last third gives Hutchinson samples of the remainder,
    whose standard error is that of the estimate. With a tolerance the sketch starts with 8 vectors,
    and doubles while the samples still needed, by the variance of 16, outnumber the vectors of the
    sketch; fewer than 32 vectors leave no room for one.
    """
    if budget.covers(len(probes.directions)):
        return exact_trace(operator, integrand, probes)
    sampler = HutchinsonSampler(operator, integrand, probes)
    vectors = budget.vectors + sampler.matvecs
    if budget.tol is None:
        _sketch(sampler, operator, 0, budget.vectors // THIRDS)
    else:
        _sketch_until(sampler, operator, vectors, budget.tol)
    sampler.sample_until(budget.tol, vectors - sampler.matvecs + len(sampler.samples))
    return sampler.estimates()


def _sketch_until(
    sampler: HutchinsonSampler, operator: OperatorBase, vectors: int, tol: float
) -> None:
    """Double the sketch while that saves samples."""
    sketched = 0
    while True:
        wanted = min(2 * sketched or BLOCK, sampler.size)
        room = (vectors - sampler.matvecs - MIN_SAMPLES) // 2
        if wanted == sketched or wanted - sketched > room:
            return
        _sketch(sampler, operator, sketched, wanted)
        sketched = wanted
        sampler.sample(MIN_SAMPLES)
        if _needed(sampler, tol) <= 2 * sketched:
            return


def _sketch(sampler: HutchinsonSampler, operator: OperatorBase, start: int, stop: int) -> None:
    """Deflate by the range of A times sign vectors `start` to `stop`."""
    require_room(2 * stop, operator)
    key = random.fold_in(sampler.seed, "sketch")
    for i in range(start, stop, BLOCK):
        indices = range(i, min(i + BLOCK, stop))
        signs = sign_vectors(sampler.size, key, indices, sampler.dtype, sampler.device)
        sampler.deflate(new_directions(operator @ signs, sampler.basis))
        sampler.matvecs += len(indices)


def _needed(sampler: HutchinsonSampler, tol: float) -> float:
    """Samples that the tolerance would take, by the variance of the present ones."""
    estimate = sampler.total()
    aim = tol * abs(estimate.value)
    if estimate.std_error <= aim:
        return estimate.samples
    return estimate.samples * (estimate.std_error / aim) ** 2 if aim else float("inf")
