"""Trace estimators by name: the values of `method=`, what each one needs, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ...._utils.results import Estimate
from .._probes import BLOCK, MIN_SAMPLES
from ._integrands import TraceIntegrand


class Budget(NamedTuple):
    """The number of vectors that an estimator may multiply; fewer if it meets `tol` earlier."""

    vectors: int
    tol: float | None = None

    def covers(self, size: int) -> bool:
        """Whether all P unit vectors are no more than the vectors that an estimate would take."""
        fewest = self.vectors if self.tol is None else min(self.vectors, 2 * BLOCK + MIN_SAMPLES)
        return size <= fewest


class Probes(NamedTuple):
    """The seed of sign vectors, and what is known of the traces without them.

    The share of the traces on `directions` [P, r] is computed exactly; `known` ([L] or [1]) is
    added to the L traces, such as that of weight decay.
    """

    seed: int
    directions: Tensor
    known: Tensor


class TraceEstimates(NamedTuple):
    """The traces of L diagonal blocks, and their sum, to which a tolerance applies."""

    blocks: list[Estimate]
    total: Estimate


Estimator: TypeAlias = Callable[[Any, TraceIntegrand, Budget, Probes], TraceEstimates]


class TraceMethod(NamedTuple):
    """A registered estimator; for the attributes see `trace_estimator`."""

    estimate: Estimator
    min_probes: int
    group_by: bool
    symmetric: bool
    hessian_only: bool


METHODS: dict[str, TraceMethod] = {}


def trace_estimator(
    name: str,
    *,
    min_probes: int = 1,
    group_by: bool = False,
    symmetric: bool = False,
    hessian_only: bool = False,
) -> Callable[[Estimator], Estimator]:
    """Register a function of (operator, integrand, budget, probes) as `method=name`.

    The integrand averages to the traces wanted, over vectors with E v v^T = I; the operator is
    that of the integrand, without the multiple of the identity that it is known to have.

    Args:
        name: the value of `method=`.
        min_probes: fewest vectors it needs, unless P unit vectors are fewer.
        group_by: whether it estimates the traces of several diagonal blocks at once.
        symmetric: whether it is unbiased for symmetric operators only.
        hessian_only: whether the operator must be a `HessianOperator`.
    """

    def register(estimate: Estimator) -> Estimator:
        METHODS[name] = TraceMethod(estimate, min_probes, group_by, symmetric, hessian_only)
        return estimate

    return register


def names(*, group_by: bool = False, hessian: bool = True) -> tuple[str, ...]:
    """Names of the estimators, or of those that take groups, or any operator."""
    return tuple(
        name
        for name, method in METHODS.items()
        if (method.group_by or not group_by) and (hessian or not method.hessian_only)
    )
