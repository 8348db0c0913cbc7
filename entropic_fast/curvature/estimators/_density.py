"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

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
from ..operators._algebra import (
    OperatorBase,
    ProjectedOperator,
    as_operator,
    multiply,
    orthonormal,
    without,
)
from ..operators._linear_operator import LinearOperator, not_finite
from ._block_lanczos import stride_of
from ._krylov_basis import ROUNDING, require_symmetry
from ._quadrature import Rule, other_rules, stacked, tridiagonal

# Default width of the smoothing Gaussian, as a share of the range of Ritz values.
SIGMA_SHARE = 0.01
# Up to this order the matrix is formed where that takes no more products than the probes' steps.
# At 1024 its eigenvalues take as long as some ten products of a small network.
EXACT = 1024
# Unit vectors multiplied at once to form it.
TOGETHER = 32
# Smoothing widths that the default grid goes beyond the Ritz values: the tails are there.
MARGIN = 5.0


def spectral_density(
    operator: LinearOperator | Tensor,
    probes: int = 8,
    steps: int = 60,
    sigma: float | None = None,
    grid: Tensor | None = None,
    points: int = 512,
    seed: int = 0,
    memory_budget: int | None = None,
    along: Tensor | None = None,
) -> Density:
    """Density of the eigenvalues of a symmetric operator, smoothed by a Gaussian.

    For each probe, `steps` Lanczos steps with full two-pass reorthogonalization give a Gauss
    quadrature rule: nodes are the Ritz values, weights the *squared first components* of the
    eigenvectors of the tridiagonal matrix (Golub and Welsch 1969; Ubaru, Chen, Saad, SIAM J.
    Matrix Anal. Appl. 38, 2017). The mean over probes of sum_i w_i f(node_i) estimates
    tr f(A) / P without bias for polynomials f of degree up to 2 steps - 1; `Density.trace`
    gives it for any f, with its standard error.

    Where P is at most probes x steps (and 1024), P products form the matrix instead, and all
    eigenvalues are the nodes: `Density.exact`, without error.

    Args:
        operator: symmetric; anything with `shape`, `dtype` and `@` on blocks, a matrix too.
        probes: V, normal vectors scaled to length 1.
        steps: m, Lanczos steps a probe, at most P of use.
        sigma: width of the Gaussian, in units of the eigenvalues; None for 1 % of the range
            of the Ritz values.
        grid: eigenvalues at which to give the density; None for `points` evenly spaced ones
            from 5 sigma under the least Ritz value to 5 sigma over the greatest.  # [G]
        points: G, for the default grid.
        seed: of the probes; they do not depend on the device or the memory.
        memory_budget: bytes for Lanczos vectors; None for a quarter of the free memory,
            half on a GPU. It decides how many probes advance together.
        along: directions to leave out, such as a path's tangent: the density is that of
            Z^T A Z, for Z an orthonormal basis of what is orthogonal to them.  # [P] or [P, r]

    Returns:
        see `Density`. Where steps or probes are too few for sigma (`Density.converged`), with a
        `NotConvergedWarning`. A probe whose Krylov space is exhausted early has rows padded with
        its last node at weight 0.

    Raises:
        ValueError: an operator that is not square or not symmetric; counts, sigma, grid or along
            out of range; a budget under one probe's needs; a product that is not finite.

    >>> import torch
    >>> d = spectral_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])), probes=2, steps=3)
    >>> [round(v, 3) for v in d.nodes[0].tolist()], round(float(d.weights.sum()), 4)
    ([1.0, 2.0, 4.0], 1.0)
    """
    density, _ = density_and_pairs(
        operator, probes, steps, sigma, grid, points, seed, memory_budget, along
    )
    if not density.converged:
        found = (
            f"the curve of fewer steps is off by {density.resolution:.2g} of the eigenvalues "
            f"against {RESOLUTION:g}, the probes' standard error by {density.probe_error:.2g} "
            f"against {PROBE_ERROR:g}"
        )
        more = [
            name
            for name, value, limit in (
                ("steps", density.resolution, RESOLUTION),
                ("probes", density.probe_error, PROBE_ERROR),
            )
            if value > limit
        ]
        warn_not_converged(
            f"spectral_density: not converged after {probes} probes of {density.nodes.shape[1]} "
            f"steps: {found}; raise {' and '.join(more)}, or sigma ({density.sigma:.3g})"
        )
    return density


@full_precision()
def density_and_pairs(
    operator: LinearOperator | Tensor,
    probes: int = 8,
    steps: int = 60,
    sigma: float | None = None,
    grid: Tensor | None = None,
    points: int = 512,
    seed: int = 0,
    memory_budget: int | None = None,
    along: Tensor | None = None,
    kept: int = 1,
) -> tuple[Density, Eigenpairs]:
    """`spectral_density`, and the largest Ritz pairs of the same products.

    Args:
        kept: most pairs to return.

    Returns:
        the density, and the Ritz pairs of the probe whose largest Ritz value is the largest of
        all: it is the most exact, as none exceeds the largest eigenvalue. Their residuals are
        beta |last coordinate|, from the recurrence, and its rounding. `matvecs` are all probes'
        products, `converged` is not judged and False. With `along` they are pairs of the
        operator across it.

    >>> import torch
    >>> _, pairs = density_and_pairs(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 2, kept=2)
    >>> [round(v, 3) for v in pairs.values.tolist()], float(pairs.residuals.max()) < 1e-4
    ([4.0, 2.0], True)
    """
    operator = as_operator(operator)
    size, dtype, device = operator.order, operator.dtype, operator.device
    checks.integer("probes", probes, 1)
    checks.integer("points", points, 2)
    left_out = None if along is None else orthonormal(along, size, dtype, device)
    count = size - (0 if left_out is None else left_out.shape[1])
    steps = min(checks.integer("steps", steps, 1), count)
    if sigma is not None:
        checks.positive("sigma", sigma)
    if grid is not None and (not isinstance(grid, Tensor) or grid.ndim != 1 or len(grid) == 0):
        raise checks.invalid("grid", "a tensor [G] of eigenvalues", checks.describe(grid))
    budget = resolve_budget(memory_budget, device)
    each = (steps + 4) * size * torch.finfo(dtype).bits // 8
    if budget < each:
        raise too_small(
            each,
            budget,
            f"{steps} Lanczos vectors of length {size}",
            "give more memory, or fewer steps",
        )
    if size <= min(EXACT, probes * steps):
        nodes, pairs = _exact(operator, left_out, kept)
        weights = torch.full_like(nodes, 1 / count)
        density = _density(nodes[None], weights[None], (), sigma, grid, points, exact=True)
        return density, pairs
    if left_out is not None:
        operator = ProjectedOperator(operator, left_out)
    together = min(probes, budget // each)
    rules: list[Rule] = []
    others: list[list[Rule]] = []
    best: Eigenpairs | None = None
    matvecs = 0
    for first in range(0, probes, together):
        starts = torch.stack(
            [
                random.normal(
                    (size,), random.fold_in(seed, "density"), i, dtype=dtype, device=device
                )
                for i in range(first, min(first + together, probes))
            ]
        )
        if left_out is not None:
            starts = without(left_out, starts.T).T
        spaces, taken = _lanczos(operator, starts, steps)
        matvecs += taken * len(starts)
        rules += [(t.nodes, t.coordinates[0].square()) for t in spaces]
        others += [other_rules(t.diagonal, t.off_diagonal, t.rounding) for t in spaces]
        space = max(spaces, key=lambda t: float(t.nodes[-1]))
        if best is None or float(space.nodes[-1]) > float(best.values[0]):
            best = _largest(space, kept)
        del spaces, space
    nodes, weights = stacked(rules, steps)
    several = tuple(stacked(kind, steps + 1) for kind in zip(*others, strict=True))
    assert best is not None
    pairs = Eigenpairs(best.values, best.vectors, best.residuals, matvecs, False)
    density = _density(nodes, weights, several, sigma, grid, points, size=count)
    return density, pairs


def _density(
    nodes: Tensor,
    weights: Tensor,
    others: tuple[Rule, ...],
    sigma: float | None,
    grid: Tensor | None,
    points: int,
    *,
    size: int | None = None,
    exact: bool = False,
) -> Density:
    """The smoothed curve of rules [V, m], with the defaults of `spectral_density`.

    Args:
        size: how many eigenvalues there are; None for as many as nodes.
    """
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # An operator with one eigenvalue has no range: a width to its scale instead.
        sigma = SIGMA_SHARE * (high - low)
        if sigma <= 1e-6 * max(abs(low), abs(high)):
            sigma = SIGMA_SHARE * (max(abs(low), abs(high)) or 1.0)
    if grid is None:
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
        grid = torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
    where = checks.finite("grid", grid).detach().double().cpu()
    curves = torch.stack(
        [smoothed(where, n, w, sigma) for n, w in zip(nodes, weights, strict=True)]
    )
    if exact:
        error = torch.zeros_like(where)
    elif len(nodes) > 1:
        error = curves.std(0) / math.sqrt(len(nodes))
    else:
        error = torch.full_like(where, math.nan)
    count = nodes.shape[1] if size is None else size
    return Density(where, curves.mean(0), error, nodes, weights, sigma, count, others, exact)


def _exact(operator: OperatorBase, left_out: Tensor | None, kept: int) -> tuple[Tensor, Eigenpairs]:
    """All eigenvalues [P - r], ascending, and the largest pairs, from P products.

    Args:
        left_out: orthonormal directions [P, r] that the operator is taken across.
    """
    size, dtype, device = operator.order, operator.dtype, operator.device
    blocks = []
    for start in range(0, size, TOGETHER):
        units = torch.zeros(size, min(TOGETHER, size - start), dtype=dtype, device=device)
        units[start : start + TOGETHER].fill_diagonal_(1)
        blocks.append(multiply(operator, units).double().cpu())
    matrix = torch.cat(blocks, 1)
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
    """The Krylov space of one probe, and its Ritz pairs.

    Attributes:
        basis: orthonormal rows, on the operator's device.  # [m, P]
        diagonal, off_diagonal: of the tridiagonal matrix, the last entry the length of what
            follows the basis; float64 on the CPU, as the rest.  # [m], [m]
        nodes: Ritz values, ascending.  # [m]
        coordinates: of the Ritz vectors, in columns.  # [m, m]
        rounding: of the products.
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor
    nodes: Tensor
    coordinates: Tensor
    rounding: float


def _lanczos(operator: OperatorBase, starts: Tensor, steps: int) -> tuple[list[_Space], int]:
    """Lanczos for several starting vectors [V, P] in step, one block product a step.

    Steps wait for nothing on the operator's device; every few of them it is asked whether any
    probe goes on. A probe whose Krylov space is exhausted goes on as a vector of zeros. Where steps
    that did not wait end in an error, all are computed again, each waiting for its product, which
    says what is wrong or is computed by autograd.

    Returns:
        the space of each probe, m under `steps` where it was exhausted; and the steps taken.
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
    """`_lanczos`, with a look at every `stride`-th product."""
    probes, size = starts.shape
    basis = starts.new_zeros(probes, steps, size)
    alphas = starts.new_zeros(probes, steps, dtype=torch.float64)
    betas, lengths, scale = torch.zeros_like(alphas), alphas[:, 0] + 1, alphas[:, 0].clone()
    gap = torch.zeros_like(scale)
    going = torch.ones(probes, dtype=torch.bool, device=starts.device)
    current = starts / starts.norm(dim=1, keepdim=True)
    for j in range(steps):
        look = j % stride == 0
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
        if j:  # of a symmetric operator the column has one more entry
            column[:, j - 1] -= betas[:, j - 1]
            gap = torch.maximum(gap, column[:, :j].abs().amax(1))
        beta = rest.norm(dim=1)
        if j + 1 == steps:
            betas[:, j] = beta.double() * going
            break
        going = going & (beta > ROUNDING * torch.finfo(starts.dtype).eps * scale)
        rest = rest / beta.clamp(min=torch.finfo(starts.dtype).tiny)[:, None]
        # A short remainder is mostly rounding: make it orthogonal once more.
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
    """The largest Ritz pairs of a probe, largest first."""
    chosen = space.coordinates.flip(1)[:, :kept]
    vectors = space.basis.T @ chosen.to(space.basis)
    remainder = space.off_diagonal[-1] * chosen[-1].abs()
    residuals = torch.hypot(remainder, torch.tensor(space.rounding, dtype=torch.float64))
    values = space.nodes.flip(0)[:kept]
    return Eigenpairs(values.to(vectors), vectors, residuals.to(vectors), 0, False)
