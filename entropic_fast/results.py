"""What the estimators return: every stochastic number with its standard error, every
eigenvalue with its residual."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples.

    Attributes:
        value: the estimate.
        std_error: standard error of `value` over the samples; NaN from a single sample,
            0.0 for a quantity computed exactly.
        probes: number of samples averaged (probe vectors, or examples); vectors multiplied in
            all, for methods that multiply others too.

    >>> print(Estimate(2.5, 0.25, 16))
    2.5 ± 0.25 (16 samples)
    """

    value: float
    std_error: float
    probes: int

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.std_error:.2g} ({self.probes} samples)"

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of an operator, as a mean over probes.

    Attributes:
        value: the estimate, in float64.  # [P]
        std_error: standard error of each entry; NaN from a single probe.  # [P]
        probes: number of probes averaged.
    """

    value: Tensor
    std_error: Tensor
    probes: int


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs of a symmetric operator.

    Attributes:
        values: eigenvalues, the wanted end first.  # [k]
        vectors: orthonormal eigenvectors in columns.  # [P, k]
        residuals: ||A v - lambda v||; an eigenvalue of A lies within this distance of
            each value.  # [k]
        matvecs: operator-vector products spent.
        converged: whether every residual met the tolerance asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool


@dataclass(frozen=True)
class Density:
    """Spectral density by stochastic Lanczos quadrature.

    Attributes:
        grid: eigenvalues at which the density is given.  # [G]
        density: density smoothed by a Gaussian of width `sigma`; integrates to 1 over the
            real line.  # [G]
        std_error: standard error of `density` over the probes.  # [G]
        nodes: Ritz values of each probe.  # [V, m]
        weights: quadrature weights of each probe; each row sums to 1.  # [V, m]
        sigma: width of the Gaussian, in units of the eigenvalues.
        size: order P of the operator (the number of eigenvalues).
    """

    grid: Tensor
    density: Tensor
    std_error: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float
    size: int
