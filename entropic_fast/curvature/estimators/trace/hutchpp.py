"""Hutch++: the range of a random sketch exactly, the rest by Hutchinson's estimator.

Meyer, Musco, Musco and Woodruff, *Hutch++: Optimal stochastic trace estimation*, SOSA 2021,
algorithm 1. An error of eps times the trace of a positive semi-definite matrix takes some 1 / eps
products, where Hutchinson's estimator takes 1 / eps^2.
"""

from __future__ import annotations

from typing import Any

from ...._utils import checks
from ....ops.random_bits import streams as random
from ...operators._linear_operator import multiply
from .._probes import BLOCK, MIN_SAMPLES, sign_vectors
from ._deflation import new_directions, require_room
from .hutchinson import Hutchinson

# A vector of the sketch, one of its range and one of the rest.
FEWEST = 3


def hutchpp(sampler: Hutchinson, operator: Any, probes: int, tol: float | None, seed: int) -> None:
    """Spend `probes` vectors: a third on a sketch, as many on its range, the others on the rest.

    With a tolerance the sketch begins with 8 vectors, and doubles as long as the samples that the
    rest still needs, by the variance of 16, are more than the vectors spent on the sketch.

    Args:
        sampler: without samples; its basis grows by the sketch's range.
        operator: symmetric, as `require_operator` asks.

    Raises:
        ValueError: fewer than 3 probes; a sketch that does not fit the memory.
    """
    checks.integer("probes", probes, FEWEST)
    if tol is None:
        _sketch(sampler, operator, 0, probes // FEWEST, seed)
        sampler.sample(probes - sampler.matvecs)
        return
    sketched = 0
    while True:
        wanted = min(2 * sketched or BLOCK, sampler.size)
        room = (probes - sampler.matvecs - MIN_SAMPLES) // 2
        if wanted == sketched or wanted - sketched > room:
            break
        _sketch(sampler, operator, sketched, wanted, seed)
        sketched = wanted
        sampler.sample(MIN_SAMPLES)
        if _needed(sampler, tol) <= 2 * sketched:
            break
    sampler.sample_until(tol, probes - sampler.matvecs + len(sampler.samples))


def _sketch(sampler: Hutchinson, operator: Any, start: int, stop: int, seed: int) -> None:
    """Take the range of A times sign vectors `start` to `stop` out of the samples."""
    require_room(2 * stop, operator)
    key = random.fold_in(seed, "sketch")
    for i in range(start, stop, BLOCK):
        taken = range(i, min(i + BLOCK, stop))
        signs = sign_vectors(sampler.size, key, taken, sampler.dtype, sampler.device)
        sampler.deflate(new_directions(multiply(operator, signs), sampler.basis))
        sampler.matvecs += len(taken)


def _needed(sampler: Hutchinson, tol: float) -> float:
    """Samples that the tolerance would take, by the variance of those there are."""
    estimate = sampler.total()
    aim = tol * abs(estimate.value)
    if estimate.std_error <= aim:
        return estimate.probes
    return estimate.probes * (estimate.std_error / aim) ** 2 if aim else float("inf")
