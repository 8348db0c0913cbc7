"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._torch.memory_budget import resolve_budget, too_small
from ..._utils import checks
from ..._utils.convergence import warn_not_converged
from ..._utils.results import PROBE_ERROR, RESOLUTION, Density, Eigenpairs, smoothed
from ...ops.random_bits import streams as random
from ..operators._algebra import OperatorBase, ProjectedOperator, as_operator, multiply
from ..operators._linear_operator import LinearOperator, not_finite
from ..operators._projection import orthonormal, without
from ._block_lanczos import stride_of
from ._krylov_basis import ROUNDING, require_symmetry
from ._probes import unit_vectors
from ._quadrature import Rule, other_rules, stacked, tridiagonal
from ._settings import DensitySettings

# Default width of the smoothing Gaussian, relative to the range of Ritz values.
SIGMA_SHARE = 0.01
# Up to this order the matrix is formed if that takes no more products than the probes' steps. At
# 1024 its eigenvalues take as long as some ten products of a small network.
EXACT = 1024
# Unit vectors multiplied at once to form it.
TOGETHER = 32
# The default grid extends this many smoothing widths beyond the Ritz values, for the tails.
MARGIN = 5.0


def spectral_density(
    operator: LinearOperator | Tensor,
    settings: DensitySettings = DensitySettings(),
    *,
    seed: int = 0,
    orthogonal_to: Tensor | None = None,
    memory_budget: int | None = None,
) -> Density:
    """Density of the eigenvalues of a symmetric operator, smoothed by a Gaussian.

    For each probe, Lanczos steps with full two-pass reorthogonalization give a Gauss quadrature
    rule: nodes are the Ritz values, weights the squared first components of the eigenvectors of
    the tridiagonal matrix (Golub and Welsch 1969; Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38,
    2017). The mean over probes of sum_i w_i f(node_i) estimates tr f(A) / P without bias for
    polynomials f of degree up to 2 steps - 1; `Density.trace` gives it for any f, with its errors.
    If P is at most probes x steps (and 1024), P products form the matrix instead, and all
    eigenvalues are the nodes, without error (`Density.exact`).

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@` on blocks, a matrix too.
        settings: probes, steps, and the grid.
        seed: of the probes; they do not depend on the device or the memory.
        orthogonal_to: directions [P] or [P, r] to leave out, such as a path's tangent: the density
            is that of Z^T A Z, for Z an orthonormal basis of their orthogonal complement.
        memory_budget: bytes for Lanczos vectors; None for a quarter of the free memory, half on a
            GPU. It decides how many probes advance together.

    Returns:
        see `Density`; with a `NotConvergedWarning` if steps or probes are too few for sigma. A
        probe whose Krylov space is exhausted early has rows padded with its last node at weight 0.

    Raises:
        ValueError: an operator that is not square or not symmetric; directions out of range; a
            budget below one probe's needs; a product that is not finite.

    >>> import torch
    >>> settings = DensitySettings(probes=2, steps=3)
    >>> d = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])), settings)
    >>> [round(v, 3) for v in d.nodes[0].tolist()], round(float(d.weights.sum()), 4)
    ([1.0, 2.0, 4.0], 1.0)
    """
    density, _ = density_and_pairs(
        operator, settings, seed=seed, orthogonal_to=orthogonal_to, memory_budget=memory_budget
    )
    if not density.converged:
        more = [
            name
            for name, value, limit in (
                ("steps", density.resolution, RESOLUTION),
                ("probes", density.probe_error, PROBE_ERROR),
            )
            if value > limit
        ]
        warn_not_converged(
            f"spectral_density: not converged after {settings.probes} probes of "
            f"{density.nodes.shape[1]} steps: the curve of fewer steps is off by "
            f"{density.resolution:.2g} of the eigenvalues against {RESOLUTION:g}, the probes' "
            f"standard error by {density.probe_error:.2g} against {PROBE_ERROR:g}; raise "
            f"{' and '.join(more)}, or sigma ({density.sigma:.3g})"
        )
    return density


@full_precision()
def density_and_pairs(
    operator: LinearOperator | Tensor,
    settings: DensitySettings = DensitySettings(),
    *,
    seed: int = 0,
    orthogonal_to: Tensor | None = None,
    memory_budget: int | None = None,
    kept: int = 1,
) -> tuple[Density, Eigenpairs]:
    """`spectral_density`, and at most `kept` of the largest Ritz pairs of the same products.

    The pairs are those of the probe with the largest Ritz value: the most accurate one, as none
    exceeds the largest eigenvalue. Residuals are beta |last coordinate| and rounding; `converged`
    is False, as no tolerance was asked for. With `orthogonal_to` the pairs are the projected
    operator's.

    >>> import torch
    >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> _, pairs = density_and_pairs(matrix, DensitySettings(probes=2), kept=2)
    >>> [round(v, 3) for v in pairs.values.tolist()], float(pairs.residuals.max()) < 1e-4
    ([4.0, 2.0], True)
    """
    checks.instance("settings", settings, DensitySettings)
    operator = as_operator(operator)
    size, dtype, device = operator.order, operator.dtype, operator.device
    left_out = None
    if orthogonal_to is not None:
        left_out = orthonormal(orthogonal_to, size, dtype, device, "orthogonal_to")
    count = size - (0 if left_out is None else left_out.shape[1])
    steps = min(settings.steps, count)
    budget = resolve_budget(memory_budget, device)
    probe_bytes = (steps + 4) * size * torch.finfo(dtype).bits // 8
    if budget < probe_bytes:
        raise too_small(
            probe_bytes,
            budget,
            f"{steps} Lanczos vectors of length {size}",
            "give more memory, or fewer steps",
        )
    if size <= min(EXACT, settings.probes * steps):
        nodes, pairs = _exact(operator, left_out, kept)
        weights = torch.full_like(nodes, 1 / count)
        return _density(nodes[None], weights[None], (), settings, count, exact=True), pairs
    together = min(settings.probes, budget // probe_bytes)
    probes = _advance_probes(operator, left_out, settings.probes, steps, seed, together, kept)
    nodes, weights = stacked(probes.rules, steps)
    others = tuple(stacked(kind, steps + 1) for kind in zip(*probes.others, strict=True))
    return _density(nodes, weights, others, settings, count), probes.pairs


class _Probes(NamedTuple):
    """Quadrature rules of all probes: the Gauss rules, other rules of each, and the best pairs."""

    rules: list[Rule]
    others: list[list[Rule]]
    pairs: Eigenpairs


def _advance_probes(
    operator: OperatorBase,
    left_out: Tensor | None,
    probes: int,
    steps: int,
    seed: int,
    together: int,
    kept: int,
) -> _Probes:
    """Run Lanczos for all probes, `together` at a time."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    if left_out is not None:
        operator = ProjectedOperator(operator, left_out)
    key = random.fold_in(seed, "density")
    rules: list[Rule] = []
    others: list[list[Rule]] = []
    best: Eigenpairs | None = None
    matvecs = 0
    for first in range(0, probes, together):
        indices = range(first, min(first + together, probes))
        starts = torch.stack(
            [random.normal((size,), key, i, dtype=dtype, device=device) for i in indices]
        )
        if left_out is not None:
            starts = without(left_out, starts.T).T
        spaces, products = _lanczos(operator, starts, steps)
        matvecs += products * len(starts)
        rules += [(t.nodes, t.coordinates[0].square()) for t in spaces]
        others += [other_rules(t.diagonal, t.off_diagonal, t.rounding) for t in spaces]
        best = _best_pairs(best, spaces, kept)
        del spaces  # before the next probes are made
    assert best is not None
    return _Probes(rules, others, dataclasses.replace(best, matvecs=matvecs))


def _best_pairs(best: Eigenpairs | None, spaces: list[_Space], kept: int) -> Eigenpairs:
    """The largest pairs of the space with the largest Ritz value, unless `best` has a larger."""
    space = max(spaces, key=lambda t: float(t.nodes[-1]))
    if best is not None and float(space.nodes[-1]) <= float(best.values[0]):
        return best
    return _largest(space, kept)


def _density(
    nodes: Tensor,
    weights: Tensor,
    others: tuple[Rule, ...],
    settings: DensitySettings,
    size: int,
    *,
    exact: bool = False,
) -> Density:
    """The smoothed curve of rules [V, m] for `size` eigenvalues."""
    low, high = float(nodes.min()), float(nodes.max())
    sigma = _default_sigma(low, high) if settings.sigma is None else settings.sigma
    grid = settings.grid
    if grid is None:
        grid = _default_grid(low, high, sigma, settings.points)
    where = grid.detach().double().cpu()
    curves = torch.stack(
        [smoothed(where, n, w, sigma) for n, w in zip(nodes, weights, strict=True)]
    )
    if exact:
        error = torch.zeros_like(where)
    elif len(nodes) > 1:
        error = curves.std(0) / math.sqrt(len(nodes))
    else:
        error = torch.full_like(where, math.nan)
    return Density(where, curves.mean(0), error, nodes, weights, sigma, size, others, exact)


def _default_sigma(low: float, high: float) -> float:
    """A share of the range of Ritz values, or of their scale if the range is rounding."""
    sigma = SIGMA_SHARE * (high - low)
    if sigma <= 1e-6 * max(abs(low), abs(high)):
        sigma = SIGMA_SHARE * (max(abs(low), abs(high)) or 1.0)
    return sigma


def _default_grid(low: float, high: float, sigma: float, points: int) -> Tensor:
    margin = MARGIN * sigma
    # At a spacing of 1.5 sigma the trapezium rule is off by 2e-4, and soon by far more.
    needed = math.ceil((high - low + 2 * margin) / (1.5 * sigma)) + 1
    if points < needed:
        raise checks.invalid(
            "points",
            f"at least {needed}, a spacing of 1.5 sigma (sigma = {sigma:.3g}) over the "
            "eigenvalues' range",
            str(points),
            "ask for more points, or a larger sigma",
        )
    return torch.linspace(low - margin, high + margin, points, dtype=torch.float64)


def _exact(operator: OperatorBase, left_out: Tensor | None, kept: int) -> tuple[Tensor, Eigenpairs]:
    """All eigenvalues [P - r], ascending, and the largest pairs, from P products."""
    size, dtype, device = operator.order, operator.dtype, operator.device
    units = unit_vectors(size, dtype, device, TOGETHER)
    matrix = torch.cat([(operator @ block).double().cpu() for block in units], 1)
    gap = matrix - matrix.T
    require_symmetry(operator, float(gap.abs().max()), float(matrix.norm(dim=0).max()))
    basis = torch.eye(size, dtype=torch.float64)
    if left_out is not None:
        full = torch.linalg.qr(left_out.double().cpu(), mode="complete")[0]
        basis = full[:, left_out.shape[1] :]
        matrix = basis.T @ matrix @ basis
    nodes, coordinates = torch.linalg.eigh((matrix + matrix.T) / 2)
    chosen, values = coordinates.flip(1)[:, :kept], nodes.flip(0)[:kept]
    rounding = ROUNDING * torch.finfo(dtype).eps * float(nodes.abs().max())
    residuals = torch.linalg.vector_norm(matrix @ chosen - values * chosen, dim=0)
    residuals = torch.hypot(residuals, residuals.new_tensor(rounding))
    vectors = (basis @ chosen).to(device, dtype)
    return nodes, Eigenpairs(values.to(vectors), vectors, residuals.to(vectors), size, False)


class _Space(NamedTuple):
    """The Krylov space of one probe, and its Ritz pairs; all but `basis` on the CPU in float64."""

    basis: Tensor  # [m, P], orthonormal rows
    diagonal: Tensor  # [m], of the tridiagonal matrix
    off_diagonal: Tensor  # [m]; the last is the norm of the residual that follows the basis
    nodes: Tensor  # [m], Ritz values, ascending
    coordinates: Tensor  # [m, m], of the Ritz vectors, in columns
    rounding: float  # of the products


def _lanczos(operator: OperatorBase, starts: Tensor, steps: int) -> tuple[list[_Space], int]:
    """The spaces of starting vectors [V, P], one block product per step, and the number of steps.

    If an error shows up, all steps are computed again, each waiting for its product, so that the
    operator can name the error, or use autograd.
    """
    stride = stride_of(starts.device)
    try:
        return _lanczos_steps(operator, starts, steps, stride)
    except ValueError:
        if stride == 1:
            raise
    return _lanczos_steps(operator, starts, steps, 1)


def _lanczos_steps(
    operator: OperatorBase, starts: Tensor, steps: int, stride: int
) -> tuple[list[_Space], int]:
    """`_lanczos`, synchronizing with the device at every `stride`-th product.

    A probe whose Krylov space is exhausted continues as a vector of zeros.
    """
    probes, size = starts.shape
    basis = starts.new_zeros(probes, steps, size)
    alphas = starts.new_zeros(probes, steps, dtype=torch.float64)
    betas, lengths, scale = torch.zeros_like(alphas), alphas[:, 0] + 1, alphas[:, 0].clone()
    gap = torch.zeros_like(scale)
    going = torch.ones(probes, dtype=torch.bool, device=starts.device)
    current = starts / starts.norm(dim=1, keepdim=True)
    for j in range(steps):
        look = j % stride == 0
        # Queued without waiting; only every few steps it is asked whether a probe is still active.
        basis[:, j] = current
        rest = multiply(operator, current.T.contiguous(), check=look).T.contiguous()
        used = basis[:, : j + 1]
        scale = torch.maximum(scale, rest.norm(dim=1).double())
        column = alphas.new_zeros(probes, j + 1)
        for _ in range(2):
            coordinates = used @ rest[:, :, None]  # [V, j + 1, 1]
            rest = rest - (coordinates.transpose(1, 2) @ used)[:, 0]
            column += coordinates[:, :, 0].double()
        alphas[:, j] = column[:, j]
        if j:  # for a symmetric operator all other entries of the column are rounding
            column[:, j - 1] -= betas[:, j - 1]
            gap = torch.maximum(gap, column[:, :j].abs().amax(1))
        beta = rest.norm(dim=1)
        if j + 1 == steps:
            betas[:, j] = beta.double() * going
            break
        going = going & (beta > ROUNDING * torch.finfo(starts.dtype).eps * scale)
        rest = rest / beta.clamp(min=torch.finfo(starts.dtype).tiny)[:, None]
        # A short remainder is mostly rounding: orthogonalize it once more.
        rest = rest - ((used @ rest[:, :, None]).transpose(1, 2) @ used)[:, 0]
        length = rest.norm(dim=1)
        going = going & (length > 0.5)
        betas[:, j] = beta.double() * going
        lengths += going
        current = torch.where(going[:, None], rest / length.clamp(min=0.5)[:, None], 0.0)
        if look and not bool(going.any()):
            break
    alphas, betas = alphas.cpu(), betas.cpu()
    if not bool((alphas.isfinite() & betas.isfinite()).all()):
        raise not_finite("products")
    require_symmetry(operator, float(gap.max()), float(scale.max()))
    rounding = torch.hypot(ROUNDING * torch.finfo(starts.dtype).eps * scale, gap).cpu()
    spaces = []
    for v, m in enumerate(int(m) for m in lengths.tolist()):
        diagonal, beside = alphas[v, :m], betas[v, :m]
        nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside))
        spaces.append(_Space(basis[v, :m], diagonal, beside, nodes, vectors, float(rounding[v])))
    return spaces, j + 1


def _largest(space: _Space, kept: int) -> Eigenpairs:
    """The largest Ritz pairs of a probe, the largest first."""
    chosen = space.coordinates.flip(1)[:, :kept]
    vectors = space.basis.T @ chosen.to(space.basis)
    remainder = space.off_diagonal[-1] * chosen[-1].abs()
    residuals = torch.hypot(remainder, torch.tensor(space.rounding, dtype=torch.float64))
    values = space.nodes.flip(0)[:kept]
    return Eigenpairs(values.to(vectors), vectors, residuals.to(vectors), 0, False)
