"""What the estimators return: every stochastic number with its standard error, every
eigenvalue with its residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import checks


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

    def trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The trace of a function of the operator: the sum of f over its P eigenvalues.

        Args:
            function: f, by element, on the nodes.  # [V, m] -> [V, m]

        Returns:
            P times the mean over probes of sum_i weight_i f(node_i), with its standard error.

        Raises:
            ValueError: values of f that are of another shape, NaN or infinite.

        >>> import torch
        >>> nodes, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
        >>> Density(nodes[0], nodes[0], nodes[0], nodes, weights, 0.1, 10).trace(torch.square).value
        50.0
        """
        values = function(self.nodes)
        if not isinstance(values, Tensor) or values.shape != self.nodes.shape:
            raise checks.fail(
                "function", f"values of shape {list(self.nodes.shape)}", checks.describe(values)
            )
        samples = self.size * (self.weights * checks.finite("function", values)).sum(1)
        probes = len(samples)
        error = float(samples.std()) / math.sqrt(probes) if probes > 1 else math.nan
        return Estimate(float(samples.mean()), error, probes)


@dataclass(frozen=True)
class LogDeterminant:
    """Sum of logarithms of a symmetric operator's positive eigenvalues.

    Attributes:
        value: the sum.
        std_error: standard error over the probes of a stochastic part; 0.0 without one, NaN from
            a single probe.
        bound: how far the eigenvalues found one by one may take the sum from theirs, each
            within its residual; infinite where a residual is as large as its eigenvalue.
        count: how many directions the sum is over.
        floor: eigenvalues at most this were left out.
        delta: what was added to each eigenvalue.
        pairs: the eigenvalues found one by one, if any.
    """

    value: float
    std_error: float
    bound: float
    count: int
    floor: float
    delta: float
    pairs: Eigenpairs | None

    def __float__(self) -> float:
        return self.value
