"""Log-determinant of a Hessian across a path: the entropic part of the effective potential."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.results import Density, Eigenpairs, Estimate, LogDeterminant
from ..operators._algebra import OperatorBase, ProjectedOperator, as_operator
from ..operators._linear_operator import LinearOperator
from ..operators._projection import orthonormal
from ._density import density_and_pairs
from ._eigenvalues import top_eigenvalues
from ._krylov_basis import ROUNDING
from ._settings import DensitySettings, LanczosSettings

# Errors of the stochastic part that count as converged, relative to the sum of the logarithms'
# absolute values. A standard error is reported and may be large; too few steps are a bias.
QUADRATURE_SHARE, PROBE_SHARE = 0.05, 0.25


@full_precision()
def log_determinant(
    operator: LinearOperator | Tensor,
    *,
    orthogonal_to: Tensor | None = None,
    k: int | None = None,
    floor: float = 0.0,
    delta: float | None = None,
    lanczos: LanczosSettings = LanczosSettings(),
    density: DensitySettings = DensitySettings(),
    seed: int = 0,
    v0: Tensor | Eigenpairs | None = None,
) -> LogDeterminant:
    """The log-determinant of a symmetric operator, on the complement of given directions.

    Integrating out the directions across a path, with Hessian H_perp = Z^T H Z for Z an
    orthonormal basis of the complement of the path's tangent, leaves the effective potential
    V_eff = (T / 2) log det H_perp at temperature T. A network's H_perp has eigenvalues near and
    below zero, so one of two sums stands for the log-determinant:

        k:      sum of log lambda_i over those of the k largest that exceed the floor, and
                rounding;
        delta:  tr log(A_+ + delta) = sum over all P - r of log(max(lambda_i, 0) + delta).

    The first is accurate to the residuals; its differences along a path are differences of
    potentials only while `count` stays the same. The second is estimated by stochastic Lanczos
    quadrature (`spectral_density`); delta is a stiffness added to every direction, such as that of
    weight decay. With both, the k largest enter the second sum one by one, which reduces the
    variance of the remainder. If delta is far below the largest eigenvalue, few Lanczos steps do
    not resolve the eigenvalues near 0, and the sum is off by more than its `std_error`;
    `quadrature` estimates by how much (see `Density.trace`). `converged` is False, with a
    `NotConvergedWarning`, if eigenvalues missed tol, `quadrature` exceeds 5 % of sum |log|, or the
    standard error 25 % of it.

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@`, a dense matrix too.
        orthogonal_to: independent directions [P] or [P, r] to leave out, of any length.
        k: how many of the largest eigenvalues to find, at most P - r.
        floor: eigenvalues up to this are left out of the first sum; at least 0.
        delta: above 0, in units of the eigenvalues.
        lanczos: of the search for the k largest.
        density: probes and steps of the quadrature.
        seed: of the random vectors of both.
        v0: start of the search, as for `top_eigenvalues`.

    Raises:
        ValueError: neither k nor delta; a floor with delta; arguments out of range; as
            `top_eigenvalues` and `spectral_density`.

    >>> import torch
    >>> H, e = torch.diag(torch.tensor([4.0, 2.0, 0.5, -1.0])), torch.eye(4)
    >>> round(float(log_determinant(H, orthogonal_to=e[1], k=2)), 4)  # log 4 + log 0.5 = log 2
    0.6931
    """
    checks.instance("lanczos", lanczos, LanczosSettings)
    checks.instance("density", density, DensitySettings)
    operator = as_operator(operator)
    size, dtype, device = operator.order, operator.dtype, operator.device
    left_out = torch.zeros(size, 0, dtype=dtype, device=device)
    if orthogonal_to is not None:
        left_out = orthonormal(orthogonal_to, size, dtype, device, "orthogonal_to")
    count = size - left_out.shape[1]
    _require_sums(k, delta, floor, count)
    if k is None:
        assert delta is not None
        messages: list[str] = []
        total = LogDeterminant(0.0, 0.0, 0.0, count, 0.0, delta, None)
    else:
        with held() as messages:
            total = _sum_over_largest(operator, left_out, k, floor, delta, lanczos, seed, v0)
        if delta is None:
            warn_once(messages, "log_determinant:")
            return total
        assert total.pairs is not None
        largest = total.pairs.vectors[:, : total.count]
        left_out = torch.cat([left_out, largest], 1)
    total = dataclasses.replace(total, count=count, floor=0.0)
    if left_out.shape[1] < size:
        total = _with_quadrature(operator, left_out, total, density, seed, messages)
    warn_once(messages, "log_determinant:")
    return dataclasses.replace(total, converged=not messages)


def _require_sums(k: int | None, delta: float | None, floor: float, count: int) -> None:
    """Reject arguments that do not choose a sum over some of `count` directions."""
    if k is None and delta is None:
        raise checks.invalid("k, delta", "at least one of the two", "neither")
    if k is not None and checks.integer("k", k, 1) > count:
        raise checks.invalid("k", f"at most the {count} directions there are", str(k))
    checks.at_least("floor", floor, 0.0)
    if delta is not None:
        checks.positive("delta", delta)
        if floor > 0:
            raise checks.invalid("floor", "0 with delta, which needs none", checks.shown(floor))


def _sum_over_largest(
    operator: OperatorBase,
    left_out: Tensor,
    k: int,
    floor: float,
    delta: float | None,
    lanczos: LanczosSettings,
    seed: int,
    v0: Tensor | Eigenpairs | None,
) -> LogDeterminant:
    """The sum over those of the k largest eigenvalues that exceed the floor, which come first."""
    if left_out.shape[1]:
        operator = ProjectedOperator(operator, left_out)
    pairs = top_eigenvalues(
        operator, k, lanczos.tol, seed, lanczos.max_matvecs, v0=v0, block=lanczos.block
    )
    # On the directions left out the projected operator is 0, and comes out as rounding.
    scale = float(pairs.values.abs().max())
    rounding = ROUNDING * torch.finfo(pairs.values.dtype).eps * scale
    kept = pairs.values > max(floor, rounding)
    value, bound = _sum_of_logs(pairs.values[kept], pairs.residuals[kept], delta or 0.0)
    return LogDeterminant(
        value, 0.0, bound, int(kept.sum()), floor, delta or 0.0, pairs, converged=pairs.converged
    )


def _with_quadrature(
    operator: OperatorBase,
    left_out: Tensor,
    total: LogDeterminant,
    settings: DensitySettings,
    seed: int,
    messages: list[str],
) -> LogDeterminant:
    """The sum, with tr log(A_+ + delta) on the complement of orthonormal directions added."""
    directions = left_out if left_out.shape[1] else None
    density, _ = density_and_pairs(operator, settings, seed=seed, orthogonal_to=directions)
    remainder = _trace_of_log(density, total.delta)
    messages += _missed(density, total.delta, remainder, abs(total.value))
    return dataclasses.replace(
        total,
        value=total.value + remainder.value,
        std_error=remainder.std_error,
        quadrature=remainder.quadrature,
    )


def density_log_determinant(density: Density, delta: float) -> Estimate:
    """tr log(A_+ + delta) from a spectral density, with its errors.

    Args:
        density: of `spectral_density`.
        delta: above 0, added to each eigenvalue's positive part.

    >>> import torch
    >>> from entropic_fast import DensitySettings, spectral_density
    >>> density = spectral_density(torch.eye(3), DensitySettings(probes=2))
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


def _missed(density: Density, delta: float, estimate: Estimate, others: float = 0.0) -> list[str]:
    """At most one message that says what is not converged in `_trace_of_log`.

    `others` is the absolute sum of the logarithms besides those of the density.
    """
    # Logarithms of both signs cancel in the sum: errors are compared with the absolute sum.
    logs = density.trace(lambda values: (values.clamp(min=0) + delta).log().abs())
    size = logs.value + others
    limits = (QUADRATURE_SHARE * size, PROBE_SHARE * size)
    pairs = (("steps", estimate.quadrature, limits[0]), ("probes", estimate.std_error, limits[1]))
    more = [name for name, error, limit in pairs if error > limit]
    if not more:
        return []
    return [
        f"errors of {estimate.quadrature:.3g} from {density.nodes.shape[1]} steps against "
        f"{limits[0]:.3g} and of {estimate.std_error:.3g} from {estimate.samples} probes against "
        f"{limits[1]:.3g}, at logarithms of size {size:.4g} in all; raise {' and '.join(more)}, "
        f"or delta ({delta:.3g})"
    ]


def _sum_of_logs(values: Tensor, residuals: Tensor, shift: float) -> tuple[float, float]:
    """Sum of log(value + shift), and how far it may be too large within the residuals."""
    values, low = values.double() + shift, values.double() - residuals.double()
    total = float(values.log().sum())
    least = low.clamp(min=0) + shift
    return total, total - float(least.log().sum()) if bool((least > 0).all()) else math.inf
