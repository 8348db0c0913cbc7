"""Traces with their standard errors: Hutchinson, Hutch++, XTrace, deflation, shares of layers."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ...._torch.full_precision import full_precision
from ...._utils import checks
from ...._utils.results import Eigenpairs, Estimate
from ....objective import Objective
from ....ops.random_bits import streams as random
from ...operators._linear_operator import require_operator, without_shift
from ...operators._second_order import HessianOperator
from ...per_example._scores import grouping
from .._probes import BLOCK, MIN_SAMPLES, judged, precise
from ._deflation import Complement, deflation_basis
from .gauss_newton import ggn_trace, quick_ggn_trace
from .hutchinson import (
    Hutchinson,
    TraceIntegrand,
    block_quadratic_forms,
    exact_trace,
    quadratic_form,
)
from .hutchpp import hutchpp
from .xtrace import xtrace

METHODS = ("hutchinson", "hutch++", "xtrace")
GAUSS_NEWTON = "gauss-newton"
DEFAULT_PROBES = 32


@overload
def hessian_trace(
    obj: Objective,
    theta: Tensor | None = None,
    probes: int = DEFAULT_PROBES,
    tol: float | None = None,
    seed: int = 0,
    *,
    method: str = "hutchinson",
    deflate: Eigenpairs | Tensor | None = None,
    group_by: None = None,
) -> Estimate: ...


@overload
def hessian_trace(
    obj: Objective,
    theta: Tensor | None = None,
    probes: int = DEFAULT_PROBES,
    tol: float | None = None,
    seed: int = 0,
    *,
    method: str = "hutchinson",
    deflate: Eigenpairs | Tensor | None = None,
    group_by: str,
) -> dict[str, Estimate]: ...


@full_precision()
def hessian_trace(
    obj: Objective,
    theta: Tensor | None = None,
    probes: int = DEFAULT_PROBES,
    tol: float | None = None,
    seed: int = 0,
    *,
    method: str = "hutchinson",
    deflate: Eigenpairs | Tensor | None = None,
    group_by: str | None = None,
) -> Estimate | dict[str, Estimate]:
    """Trace of the Hessian of the mean loss, estimated with random signs.

    Args:
        obj: the objective.
        theta: the point; None for the model's own.  # [P]
        probes, tol, method, deflate: as for `operator_trace`. One method more, "gauss-newton",
            takes the trace of the Gauss-Newton matrix from gradients, four an example (or, where
            `tol` asks for it, exactly, `ggn_trace`), and estimates the rest with random signs, by
            `HessianOperator.network_forms`: where the loss is low that is little, and few probes
            do. For examples that do not influence one another.
        seed: of the signs. They depend on nothing else, so at two points with one seed they
            are the same, and the difference of the traces is known better than each.
        group_by: None for the whole; "parameter" or "module" for the diagonal block of each, by
            name, from products instead of quadratic forms (about twice the price), by "hutchinson"
            or "hutch++". The blocks' traces add up to the whole, to which `tol` applies.

    Returns:
        value, its standard error, and the number of probes spent; `converged` is False, with a
        `NotConvergedWarning`, where tol was missed.

    Raises:
        ValueError: arguments out of range; as `HessianOperator`.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1), "mse", (x, 3 * x))
    >>> print(hessian_trace(obj, probes=4, method="hutch++"))
    7 ± 0 (2 samples)
    >>> {name: e.probes for name, e in hessian_trace(obj, group_by="parameter").items()}
    {'weight': 32, 'bias': 32}
    """
    checks.one_of("method", method, (*METHODS, GAUSS_NEWTON))
    operator = HessianOperator(obj, theta)
    if method == GAUSS_NEWTON:
        if group_by is not None:
            raise checks.invalid(
                "group_by", f'None with method="{GAUSS_NEWTON}"', checks.shown(group_by)
            )
        return _beside_gauss_newton(operator, probes, tol, seed, deflate)
    if group_by is None:
        return operator_trace(operator, probes, tol, seed, method=method, deflate=deflate)
    key = grouping(group_by)
    if method == "xtrace":
        raise checks.invalid(
            "method",
            '"hutchinson" or "hutch++" for shares of the trace (group_by=...)',
            checks.shown(method),
        )
    sizes = {name: part.numel() for name, part in obj.split(operator.theta).items()}
    names = list(dict.fromkeys(map(key, sizes)))
    groups = [names.index(key(name)) for name in sizes]
    with without_shift(operator) as (sampled, shift):
        integrand = block_quadratic_forms(sampled, list(sizes.values()), groups)
        known = torch.zeros(len(names), dtype=torch.float64)
        for group, size in zip(groups, sizes.values(), strict=True):
            known[group] += shift * size
        found = _traces(sampled, integrand, probes, tol, seed, method, deflate, known)
    return dict(zip(names, found, strict=True))


def _beside_gauss_newton(
    operator: HessianOperator,
    probes: int,
    tol: float | None,
    seed: int,
    deflate: Eigenpairs | Tensor | None,
) -> Estimate:
    """tr G from gradients, and tr (H - G) by random signs."""
    basis = _checked(operator, probes, tol, deflate)
    obj, theta = operator.obj, operator.theta
    obj.require_single_examples()
    known = quick_ggn_trace(obj, theta, random.fold_in(seed, "gauss-newton"))
    exact = tol is not None and not precise(known, tol / 2)  # most of the error is for the rest
    if exact:
        known = ggn_trace(obj.data_term(), theta)

    def integrand(vectors: Tensor) -> Tensor:
        return operator.network_forms(vectors).cpu()[:, None]

    sampler = Hutchinson(operator, integrand, seed, basis)
    others = sampler.deflated_trace + operator.shift * len(theta)
    sampler.deflated_trace, sampler.deflated_std_error = (
        others + known.value,
        0.0 if exact else known.std_error,
    )
    sampler.sample_until(tol, probes)
    if tol is not None and sampler.deflated_std_error and not precise(sampler.total(), tol):
        sampler.deflated_trace, sampler.deflated_std_error = (
            others + ggn_trace(obj.data_term(), theta).value,
            0.0,
        )
        sampler.sample_until(tol, probes)
    return judged(sampler.estimates(), sampler.total(), tol)[0]


@full_precision()
def operator_trace(
    operator: Any,
    probes: int = DEFAULT_PROBES,
    tol: float | None = None,
    seed: int = 0,
    *,
    method: str = "hutchinson",
    deflate: Eigenpairs | Tensor | None = None,
) -> Estimate:
    """Trace of a square operator, by products or quadratic forms with random signs v.

    - "hutchinson": the mean of v^T A v (Hutchinson 1990). Each sample is unbiased, with variance
      2 (||A||_F^2 - sum_i A_ii^2) for a symmetric A: nothing for a diagonal matrix. Signs have the
      least variance of all probes with independent entries. Needs quadratic forms only.
    - "hutch++": a third of the probes sketches the range of A, whose part is exact; Hutchinson's
      estimator does the rest (Meyer, Musco, Musco, Woodruff 2021). Unbiased; the standard error
      is that of the rest. With `tol`, `probes` under 32 leave no room for a sketch.
    - "xtrace": leaves one sketched vector out at a time (Epperly, Tropp, Webber 2024). Unbiased;
      the most exact where eigenvalues decay fast. Its standard error is the paper's estimate, from
      the spread of samples that share their vectors: right for a few eigenvalues over a bulk, up
      to a third too small for smooth spectra or where the signs are a good share of P.

    Where P is at most `probes`, the last two take P unit vectors instead and are exact.

    Stopping at a tolerance favors runs whose samples happen to agree. So at least 16 samples (of
    the rest; or that leave one out) are taken before, then 8 at a time. What is left of the effect
    for normal samples: stopped after 16 to 70, standard errors are 5 to 7 % too small and values
    0.06 standard errors off; after 400, 1 % and 0.02. Without `tol` there is none.

    Args:
        operator: anything with `shape`, `dtype` and `@` on blocks [P, K], and if it has it
            `quadratic_forms`; a matrix too. Symmetric, for the last two methods.
        probes: number of vectors multiplied, those of the sketch included; with `tol`, the most.
        tol: stop early once std_error <= tol |value|; a `NotConvergedWarning` if all probes
            do not reach it.
        seed: of the signs, which depend on nothing else: not on the device or the memory.
        method: "hutchinson", "hutch++" or "xtrace".
        deflate: directions Q whose part tr(Q^T A Q) is computed exactly, by as many quadratic
            forms more; only the rest, from v - Q Q^T v, is estimated. `Eigenpairs` or a matrix
            [P, r], made orthonormal. They need not be eigenvectors of A: the estimate is unbiased
            for all Q that do not depend on the signs.

    Raises:
        ValueError: an operator that is not square; arguments out of range; a product that is
            not finite; "hutch++" with fewer than 3 probes, "xtrace" with fewer than 2, or more
            vectors than fit the memory.

    >>> import torch
    >>> operator_trace(torch.diag(torch.tensor([1.0, 2.0])), probes=2).value
    3.0
    """
    checks.one_of("method", method, METHODS)
    basis = _checked(operator, probes, tol, deflate)
    with without_shift(operator) as (sampled, shift):
        known = torch.tensor([shift * len(basis)], dtype=torch.float64)
        integrand = quadratic_form(sampled)
        if method != "xtrace":
            return _traces(sampled, integrand, probes, tol, seed, method, deflate, known)[0]
        if _exact_is_cheaper(len(basis), probes, tol):
            return exact_trace(integrand, sampled, known)[0]
        rest = sampled
        if basis.shape[1]:
            known += Hutchinson(sampled, integrand, seed, basis).deflated_trace.sum()
            rest = Complement(sampled, basis)
        found = xtrace(rest, probes, tol, seed, float(known))
        return judged([found], found, tol)[0]


def _traces(
    operator: Any,
    integrand: TraceIntegrand,
    probes: int,
    tol: float | None,
    seed: int,
    method: str,
    deflate: Eigenpairs | Tensor | None,
    known: Tensor,
) -> list[Estimate]:
    """The L traces of a measure, each with what is known besides, by Hutchinson's or Hutch++."""
    checks.one_of("method", method, METHODS)
    basis = _checked(operator, probes, tol, deflate)
    if method == "hutchinson":
        sampler = Hutchinson(operator, integrand, seed, basis)
        sampler.deflated_trace = sampler.deflated_trace + known
        sampler.sample_until(tol, probes)
        return judged(sampler.estimates(), sampler.total(), tol)
    if _exact_is_cheaper(len(basis), probes, tol):
        return exact_trace(integrand, operator, known)
    sampler = Hutchinson(operator, integrand, seed, basis)
    sampler.deflated_trace = sampler.deflated_trace + known
    hutchpp(sampler, operator, probes, tol, seed)
    found = [Estimate(e.value, e.std_error, sampler.matvecs) for e in sampler.estimates()]
    return judged(found, sampler.total(), tol)


def _checked(
    operator: Any, probes: int, tol: float | None, deflate: Eigenpairs | Tensor | None
) -> Tensor:
    """The deflation basis, the other arguments being in range.  # [P, r]"""
    require_operator(operator)
    checks.integer("probes", probes, 1)
    if tol is not None:
        checks.positive("tol", tol)
    return deflation_basis(deflate, operator)


def _exact_is_cheaper(size: int, probes: int, tol: float | None) -> bool:
    """Whether P unit vectors are no more than the vectors to be spent, at least, otherwise."""
    fewest = 2 * BLOCK + MIN_SAMPLES
    return size <= (probes if tol is None else min(probes, fewest))
