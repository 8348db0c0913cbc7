"""Traces by Hutchinson's estimator, with their standard errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks, random
from ..objective import Objective
from ..results import Estimate
from .memory import resolve_budget
from .operators import HessianOperator
from .protocol import multiply, require_operator

# Probes multiplied at once: more share the graph of a batch, yet none is cheaper for it.
BLOCK = 8
DEFAULT_PROBES = 32


def hessian_trace(
    obj: Objective,
    theta: Tensor | None = None,
    probes: int = DEFAULT_PROBES,
    tol: float | None = None,
    seed: int = 0,
) -> Estimate:
    """Trace of the Hessian of the mean loss, estimated with random signs.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        probes: number of probes; with `tol`, the most to spend.
        tol: stop early once std_error <= tol |value|; looked at after every 8 probes.
        seed: of the probes. They depend on nothing else, so at two points with one seed they
            are the same, and the difference of the traces is known better than each.

    Returns:
        value, its standard error over the probes, and the number of probes.

    Raises:
        ValueError: probes or tol out of range; as `HessianOperator`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> hessian_trace(obj, probes=4)
    Estimate(value=5.0, std_error=0.0, probes=4)
    """
    return operator_trace(HessianOperator(obj, theta), probes, tol, seed)


def operator_trace(
    operator: Any, probes: int = DEFAULT_PROBES, tol: float | None = None, seed: int = 0
) -> Estimate:
    """Trace of a square operator: the mean of v^T A v over sign vectors v (Hutchinson 1990).

    Each sample is unbiased, with variance 2 (||A||_F^2 - sum_i A_ii^2): nothing for a diagonal
    matrix. Signs have the least variance of all probes with independent entries.

    Args:
        operator: anything with `shape`, `dtype` and `@` on blocks [P, K]; a matrix too.
        probes, tol, seed: as for `hessian_trace`. Stopping early favours runs whose error
            looks small, so with a loose `tol` and few probes the error is a little optimistic.

    Raises:
        ValueError: an operator that is not square; probes or tol out of range; a product
            that is not finite.

    >>> import torch
    >>> operator_trace(torch.diag(torch.tensor([1.0, 2.0])), probes=2).value
    3.0
    """
    size, dtype, device = require_operator(operator)
    checks.whole("probes", probes, 1)
    if tol is not None:
        checks.positive("tol", tol)
    # Two blocks of vectors at a time: the probes and their products.
    fits = resolve_budget(None, device) // (4 * size * torch.finfo(dtype).bits // 8)
    block = max(1, min(BLOCK, fits))
    samples: list[float] = []
    while len(samples) < probes:
        taken = range(len(samples), min(len(samples) + block, probes))
        signs = torch.stack(
            [random.rademacher((size,), seed, i, dtype=dtype, device=device) for i in taken], 1
        )
        products = multiply(operator, signs)
        samples += (signs.double() * products.double()).sum(0).tolist()
        if tol is not None and len(samples) >= BLOCK:
            estimate = _estimate(samples)
            if estimate.std_error <= tol * abs(estimate.value):
                return estimate
    return _estimate(samples)


def _estimate(samples: list[float]) -> Estimate:
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return Estimate(mean, float("nan"), 1)
    variance = math.fsum((x - mean) ** 2 for x in samples) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)
