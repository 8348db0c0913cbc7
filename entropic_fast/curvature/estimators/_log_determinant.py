"""Log-determinant of a Hessian across a path: the effective potential's entropic part."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.results import Density, Eigenpairs, Estimate, LogDeterminant
from ..operators._algebra import ProjectedOperator, as_operator, orthonormal
from ..operators._linear_operator import LinearOperator
from ._density import density_and_pairs
from ._eigenvalues import top_eigenvalues
from ._krylov_basis import ROUNDING

# Errors of the stochastic part that count as converged, as shares of the sum of the logarithms'
# sizes. A standard error tells of itself and may be large; an error of too few steps is a bias.
QUADRATURE_SHARE, PROBE_SHARE = 0.05, 0.25


@full_precision()
def log_determinant(
    operator: LinearOperator | Tensor,
    along: Tensor | None = None,
    *,
    k: int | None = None,
    floor: float = 0.0,
    delta: float | None = None,
    probes: int = 8,
    steps: int = 60,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int = 500,
    v0: Tensor | Eigenpairs | None = None,
) -> LogDeterminant:
    """The log-determinant of a symmetric operator across given directions.

    Integrating out the directions across a path, with Hessian H_perp = Z^T H Z for Z an
    orthonormal basis of what is orthogonal to the path's tangent, leaves at temperature T the
    effective potential V_eff = (T / 2) log det H_perp along it. A network's H_perp has
    eigenvalues near and below zero, so one of two sums stands for the log-determinant:

        k:      sum of log lambda_i over those of the k largest that exceed the floor, and
                rounding;
        delta:  tr log(A_+ + delta) = sum over all P - r of log(max(lambda_i, 0) + delta).

    The first is exact to the residuals. Differences along a path are of potentials only while
    `count` stays the same. The second is estimated by stochastic Lanczos quadrature
    (`spectral_density`); delta is a stiffness that every direction has besides, such as that of
    weight decay. With both, the k largest enter the second sum one by one and quadrature gives
    the rest, whose variance is far smaller. Where delta is far below the largest eigenvalue, few
    `steps` do not resolve the eigenvalues near 0 and the sum is off by more than its `std_error`,
    whatever the probes; `quadrature` estimates by how much (see `Density.trace`), and more steps
    cure it. With a `NotConvergedWarning`, `converged` is False where eigenvalues missed tol,
    `quadrature` exceeds 5 % of sum |log|, or the standard error 25 % of it.

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@`, a dense matrix too.
        along: directions to leave out, independent, of any length; None for none.
            # [P] or [P, r]
        k: how many of the largest eigenvalues to find, at most P - r.
        floor: eigenvalues at most this are left out of the first sum; at least 0.
        delta: above 0, in units of the eigenvalues.
        probes, steps: as for `spectral_density`.
        tol, max_matvecs, v0: as for `top_eigenvalues`.
        seed: of the random vectors of both.

    Raises:
        ValueError: neither k nor delta; a floor with delta; arguments out of range; as
            `top_eigenvalues` and `spectral_density`.

    >>> import torch
    >>> H = torch.diag(torch.tensor([4.0, 2.0, 0.5, -1.0]))
    >>> round(float(log_determinant(H, along=torch.tensor([0.0, 1.0, 0.0, 0.0]), k=2)), 4)  # log 2
    0.6931
    """
    operator = as_operator(operator)
    size, dtype, device = operator.order, operator.dtype, operator.device
    left_out = None if along is None else orthonormal(along, size, dtype, device)
    count = size - (0 if left_out is None else left_out.shape[1])
    if k is None and delta is None:
        raise checks.invalid("k, delta", "at least one of the two", "neither")
    if k is not None and checks.integer("k", k, 1) > count:
        raise checks.invalid("k", f"at most the {count} directions there are", str(k))
    checks.at_least("floor", floor, 0.0)
    if delta is not None:
        checks.positive("delta", delta)
        if floor > 0:
            raise checks.invalid("floor", "0 with delta, which needs none", checks.shown(floor))
    pairs = None
    messages: list[str] = []
    value = error = bound = quadrature = 0.0
    if k is not None:
        across = operator if left_out is None else ProjectedOperator(operator, left_out)
        with held() as messages:
            pairs = top_eigenvalues(across, k, tol, seed, max_matvecs, v0=v0)
        # Along the directions left out the projected operator is 0, and comes out as rounding.
        rounding = ROUNDING * torch.finfo(dtype).eps * float(pairs.values.abs().max())
        kept = pairs.values > max(floor, rounding)
        value, bound = _sum_of_logs(pairs.values[kept], pairs.residuals[kept], delta or 0.0)
        if delta is None:
            warn_once(messages, "log_determinant:")
            return LogDeterminant(
                *(value, 0.0, bound, int(kept.sum()), floor, 0.0, pairs),
                converged=pairs.converged,
            )
        known = pairs.vectors[:, kept]
        left_out = known if left_out is None else torch.cat([left_out, known], 1)
    assert delta is not None
    if left_out is None or left_out.shape[1] < size:
        along = None if left_out is None or left_out.shape[1] == 0 else left_out
        density, _ = density_and_pairs(operator, probes, steps, seed=seed, along=along)
        rest = _trace_of_log(density, delta)
        messages += _missed(density, delta, rest, abs(value))
        value, error, quadrature = value + rest.value, rest.std_error, rest.quadrature
    warn_once(messages, "log_determinant:")
    return LogDeterminant(
        value, error, bound, count, 0.0, delta, pairs, quadrature, converged=not messages
    )


def density_log_determinant(density: Density, delta: float) -> Estimate:
    """tr log(A_+ + delta) from a spectral density already computed, with its errors.

    Args:
        density: of `spectral_density`.
        delta: above 0, added to each eigenvalue's positive part.

    >>> import torch
    >>> from entropic_fast import spectral_density
    >>> density = spectral_density(torch.eye(3), probes=2)
    >>> round(density_log_determinant(density, 1.0).value, 4)  # 3 log 2
    2.0794
    """
    if not isinstance(density, Density):
        raise checks.invalid(
            "density", "a Density", checks.describe(density), "give what spectral_density returned"
        )
    checks.positive("delta", delta)
    estimate = _trace_of_log(density, delta)
    messages = _missed(density, delta, estimate)
    warn_once(messages, "density_log_determinant:")
    return dataclasses.replace(estimate, converged=not messages)


def _trace_of_log(density: Density, delta: float) -> Estimate:
    return density.trace(lambda values: (values.clamp(min=0) + delta).log())


def _missed(density: Density, delta: float, found: Estimate, others: float = 0.0) -> list[str]:
    """What is not converged in `_trace_of_log`, as at most one message.

    Args:
        others: size of the logarithms besides those of the density.
    """
    # Logarithms of both signs cancel in the sum: errors are judged by the sum of their sizes.
    logs = density.trace(lambda values: (values.clamp(min=0) + delta).log().abs())
    size = logs.value + others
    limits = (QUADRATURE_SHARE * size, PROBE_SHARE * size)
    pairs = (("steps", found.quadrature, limits[0]), ("probes", found.std_error, limits[1]))
    more = [name for name, error, limit in pairs if error > limit]
    if not more:
        return []
    return [
        f"errors of {found.quadrature:.3g} from {density.nodes.shape[1]} steps against "
        f"{limits[0]:.3g} and of {found.std_error:.3g} from {found.samples} probes against "
        f"{limits[1]:.3g}, at logarithms of size {size:.4g} in all; raise {' and '.join(more)}, "
        f"or delta ({delta:.3g})"
    ]


def _sum_of_logs(values: Tensor, residuals: Tensor, shift: float) -> tuple[float, float]:
    """Sum of log(value + shift), and how far eigenvalues within the residuals may be below it."""
    values, low = values.double() + shift, values.double() - residuals.double()
    total = float(values.log().sum())
    least = low.clamp(min=0) + shift
    return total, total - float(least.log().sum()) if bool((least > 0).all()) else math.inf
