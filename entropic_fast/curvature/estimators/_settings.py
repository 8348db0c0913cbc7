"""Settings that several functions of curvature have in common; checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..._utils import checks


@dataclass(frozen=True)
class LanczosSettings:
    """Settings of a search for eigenpairs by block Lanczos.

    Attributes:
        tol: a pair is converged when its residual is at most tol |lambda|, or at the rounding
            floor of the operator's dtype (10 eps ||A||).
        max_matvecs: most products with a vector before any that verify the residuals.
        block: most vectors multiplied at once; None for a default of the function.

    >>> LanczosSettings(tol=1e-6)
    LanczosSettings(tol=1e-06, max_matvecs=500, block=None)
    """

    tol: float = 1e-3
    max_matvecs: int = 500
    block: int | None = None

    def __post_init__(self) -> None:
        checks.positive("tol", self.tol)
        checks.integer("max_matvecs", self.max_matvecs, 1)
        if self.block is not None:
            checks.integer("block", self.block, 1)


@dataclass(frozen=True)
class DensitySettings:
    """Settings of stochastic Lanczos quadrature.

    Attributes:
        probes: V, random vectors of length 1.
        steps: m, Lanczos steps per probe, at most the order P.
        sigma: width of the smoothing Gaussian, in units of the eigenvalues; None for 1 % of the
            range of the Ritz values.
        grid: eigenvalues [G] at which to give the density; None for `points` evenly spaced ones
            from 5 sigma below the smallest Ritz value to 5 sigma above the largest.
        points: G, for the default grid.

    >>> DensitySettings(probes=4).steps
    60
    """

    probes: int = 8
    steps: int = 60
    sigma: float | None = None
    grid: Tensor | None = field(default=None, compare=False)
    points: int = 512

    def __post_init__(self) -> None:
        checks.integer("probes", self.probes, 1)
        checks.integer("steps", self.steps, 1)
        checks.integer("points", self.points, 2)
        if self.sigma is not None:
            checks.positive("sigma", self.sigma)
        grid = self.grid
        if grid is None:
            return
        if not isinstance(grid, Tensor) or grid.ndim != 1 or len(grid) == 0:
            raise checks.invalid("grid", "a tensor [G] of eigenvalues", checks.describe(grid))
        checks.finite("grid", grid)
