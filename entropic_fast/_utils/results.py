"""Results of the estimators: numbers with standard errors, eigenvalues with residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, plot_style
from . import notebook as display

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_CONVERGED = "not converged"
# A density counts as converged while the curve of fewer steps differs from it by no more than
# this share of the eigenvalues (twice, once where they are and once where they should be). At
# 0.2 the true error of random and network spectra was 0.1 to 0.14; defaults gave 0 to 0.12.
RESOLUTION = 0.2
# ... and while the standard error, integrated, is no more than this.
PROBE_ERROR = 0.3


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples.

    Attributes:
        value: the estimate.
        std_error: standard error of `value` over the samples; NaN from a single sample, 0.0 for a
            quantity computed exactly. Twice it covers 92 % of the time from 8 samples (Student's
            t), 95 % from 30 or more.
        samples: number of values averaged (probe vectors, examples or replicas).
        quadrature: estimate of an error that more samples do not reduce, of too few Lanczos steps
            in traces of functions (`Density.trace`); 0.0 for means without one.
        converged: False where a tolerance was asked for and missed.
        matvecs: number of vectors multiplied; 0 if none.

    >>> print(Estimate(2.5, 0.25, 16))
    2.5 ± 0.25 (16 samples)
    >>> print(Estimate(2.5, 0.25, 16, converged=False))
    2.5 ± 0.25 (16 samples), not converged
    """

    value: float
    std_error: float
    samples: int
    quadrature: float = 0.0
    converged: bool = True
    matvecs: int = 0

    @classmethod
    def from_samples(
        cls, samples: Tensor, exact: float = 0.0, exact_std_error: float = 0.0, matvecs: int = 0
    ) -> Estimate:
        """`exact` plus the mean of independent samples [n].

        >>> print(Estimate.from_samples(torch.tensor([1.0, 3.0]), exact=10.0))
        12 ± 1 (2 samples)
        """
        values = samples.tolist()
        n = len(values)
        mean = math.fsum(values) / n
        error = math.nan
        if n > 1:
            variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
            error = math.hypot(math.sqrt(variance / n), exact_std_error)
        return cls(exact + mean, error, n, matvecs=matvecs)

    @property
    def error(self) -> float:
        """Both errors together: the root of the sum of their squares."""
        return math.hypot(self.std_error, self.quadrature)

    def __str__(self) -> str:
        quadrature = f" ± {self.quadrature:.2g} of quadrature" if self.quadrature else ""
        said = "" if self.converged else f", {NOT_CONVERGED}"
        return f"{self.value:.6g} ± {self.std_error:.2g}{quadrature} ({self.samples} samples){said}"

    def __float__(self) -> float:
        return self.value

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("value", self.value),
            ("standard error", self.std_error),
            ("samples", self.samples),
        ]
        if self.quadrature:
            rows.insert(2, ("error of quadrature", self.quadrature))
        if not self.converged:
            rows.append(("tolerance", NOT_CONVERGED))
        return display.facts(rows)


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of an operator, as a mean over probes.

    Attributes:
        value: the estimate, in float64.  # [P]
        std_error: standard error of each entry; NaN from a single probe.  # [P]
        samples: number of probes averaged.
    """

    value: Tensor
    std_error: Tensor
    samples: int

    def __repr__(self) -> str:
        error = float(torch.linalg.vector_norm(self.std_error))
        return (
            f"Diagonal(P={len(self.value)}, sum {float(self.value.sum()):.6g}, "
            f"norm of the standard errors {error:.2g}, {self.samples} probes)"
        )


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs of a symmetric operator.

    Attributes:
        values: eigenvalues, the wanted end first.  # [k]
        vectors: orthonormal eigenvectors in columns.  # [P, k]
        residuals: ||A v - lambda v||; an eigenvalue of A lies within this distance of each
            value.  # [k]
        matvecs: number of operator-vector products.
        converged: whether every residual met the tolerance asked for.
        limits: the tolerance of each residual, infinite for pairs without one; None if
            unknown.  # [k]

    >>> pairs = Eigenpairs(torch.tensor([3.0]), torch.eye(2)[:, :1], torch.tensor([0.5]), 4, False)
    >>> pairs
    Eigenpairs([3], order 2, largest residual 0.5, 4 products, not converged)
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    limits: Tensor | None = None

    @property
    def each_converged(self) -> list[bool]:
        """Whether each residual met its limit; as all together where limits are unknown."""
        if self.limits is None:
            return [self.converged] * len(self.values)
        met: list[bool] = (self.residuals <= self.limits.to(self.residuals)).tolist()
        return met

    def __repr__(self) -> str:
        shown = [f"{value:.6g}" for value in self.values[:4].tolist()]
        more = ", ..." if len(self.values) > 4 else ""
        said = "" if self.converged else f", {NOT_CONVERGED}"
        largest = float(self.residuals.max()) if len(self.residuals) else 0.0
        return (
            f"Eigenpairs([{', '.join(shown)}{more}], order {len(self.vectors)}, largest residual "
            f"{largest:.2g}, {self.matvecs} products{said})"
        )

    def _repr_html_(self) -> str:
        marks = ["" if met else NOT_CONVERGED for met in self.each_converged]
        rows = zip(self.values.tolist(), self.residuals.tolist(), marks, strict=True)
        said = "" if self.converged else f", {NOT_CONVERGED}"
        columns = ("", "eigenvalue", "residual", *([] if self.converged else ["tolerance"]))
        return display.table(
            columns,
            [(i, *row)[: len(columns)] for i, row in enumerate(rows)],
            f"{len(self.values)} eigenpairs of order {len(self.vectors)}, "
            f"{self.matvecs} products{said}",
        )


@dataclass(frozen=True)
class Density:
    """Spectral density by stochastic Lanczos quadrature.

    Attributes:
        grid: eigenvalues at which the density is given.  # [G]
        density: density smoothed by a Gaussian of width `sigma`, with integral 1.  # [G]
        std_error: standard error of `density` over the probes.  # [G]
        nodes: Ritz values of each probe; where `exact`, all eigenvalues in one row.  # [V, m]
        weights: quadrature weights of each probe; each row sums to 1.  # [V, m]
        sigma: width of the Gaussian, in units of the eigenvalues.
        size: order P of the operator (the number of eigenvalues).
        others: nodes and weights of other rules from the same products, whose distance from the
            first estimates the error of quadrature.  # each [V, n]
        exact: whether nodes and weights are all eigenvalues, each at 1 / P, and nothing estimated.
    """

    grid: Tensor
    density: Tensor
    std_error: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float
    size: int
    others: tuple[tuple[Tensor, Tensor], ...] = ()
    exact: bool = False

    @cached_property
    def resolution(self) -> float:
        """Distance from the density of fewer steps: the integral of the absolute difference.

        At 0.2, a tenth of the eigenvalues is elsewhere. More steps or a larger sigma reduce it. NaN
        without `others`.
        """
        fewer = [
            torch.stack([smoothed(self.grid, n, w, self.sigma) for n, w in zip(*rule, strict=True)])
            for rule in self.others[1:3]
        ]
        gaps = [self._integral((curves.mean(0) - self.density).abs()) for curves in fewer]
        return max(gaps, default=math.nan)

    @cached_property
    def probe_error(self) -> float:
        """The standard error, integrated over the grid; NaN from a single probe."""
        return self._integral(self.std_error)

    @property
    def converged(self) -> bool:
        """Whether `resolution` is at most 0.2 and `probe_error` at most 0.3, where known."""
        return not (self.resolution > RESOLUTION or self.probe_error > PROBE_ERROR)

    def _integral(self, values: Tensor) -> float:
        order = self.grid.argsort()
        return float(torch.trapezoid(values[order], self.grid[order]))

    def __repr__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        said = "" if self.converged else f", {NOT_CONVERGED}"
        return (
            f"Density({self.size} eigenvalues from {low:.6g} to {high:.6g}, "
            f"{self._origin()}, sigma {self.sigma:.3g}{said})"
        )

    def _origin(self) -> str:
        probes, steps = self.nodes.shape
        return "exact" if self.exact else f"{probes} probes of {steps} steps"

    def trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The trace of a function of the operator: the sum of f over its P eigenvalues.

        The rules of m steps are exact for polynomials only. An f with a kink, or steep near 0,
        needs many steps; until then the values of all probes are off, mostly in one direction, and
        neither more probes nor the standard error show it. `quadrature` does: P times the mean over
        probes of the largest distance between the rule's value and those of `others`, the rules of
        m / 2, 3 m / 4 and m - 1 steps and the one of m + 1 nodes with one of them at 0 (Gauss and
        Radau; Golub, SIAM Rev. 15, 1973; left out where f is not finite). It is an estimate, meant
        to err on the large side, and not a bound: features that none of the rules resolves escape
        it, as does a singularity of f at 0.

        Args:
            function: f, by element, on nodes.  # [V, n] -> [V, n]

        Returns:
            P times the mean over probes of sum_i weight_i f(node_i), with its standard error and
            `quadrature`: 0 where the steps exhaust the probes' Krylov spaces, NaN without `others`.
            Without error where the density is exact.

        Raises:
            ValueError: values of f that are of another shape, NaN or infinite.

        >>> import torch
        >>> nodes, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
        >>> Density(nodes[0], nodes[0], nodes[0], nodes, weights, 0.1, 10).trace(torch.square).value
        50.0
        """
        values = function(self.nodes)
        if not isinstance(values, Tensor) or values.shape != self.nodes.shape:
            raise checks.invalid(
                "function", f"values of shape {list(self.nodes.shape)}", checks.describe(values)
            )
        samples = self.size * (self.weights * checks.finite("function", values)).sum(1)
        probes = len(samples)
        if self.exact:
            return Estimate(float(samples[0]), 0.0, self.size)
        error = float(samples.std()) / math.sqrt(probes) if probes > 1 else math.nan
        return Estimate(float(samples.mean()), error, probes, self._quadrature(function, samples))

    def _quadrature(self, function: Callable[[Tensor], Tensor], samples: Tensor) -> float:
        values = [self.size * (weights * function(nodes)).sum(1) for nodes, weights in self.others]
        gaps = [(coarser - samples).abs() for coarser in values if bool(coarser.isfinite().all())]
        return float(torch.stack(gaps).amax(0).mean()) if gaps else math.nan

    def _repr_html_(self) -> str:
        trace = self.trace(lambda nodes: nodes)
        probes, steps = self.nodes.shape
        rows = [
            ("eigenvalues", self.size),
            ("trace", display.with_error(trace.value, trace.std_error)),
            ("smallest node", float(self.nodes.min())),
            ("largest node", float(self.nodes.max())),
            ("probes", probes),
            ("steps", steps),
            ("width of the Gaussian", self.sigma),
        ]
        if self.exact:
            rows[4:6] = [("estimated", "nothing: the matrix was formed")]
        elif not self.converged:
            rows.append(("steps and probes", NOT_CONVERGED))
        return display.facts(rows) + display.plot(self._draw)

    def _draw(self, ax: Axes) -> None:
        grid, mean, half = self.grid.numpy(), self.density.numpy(), 1.96 * self.std_error.numpy()
        bottom = 1e-7 * float(mean.max())  # of a density that spans many decades
        ax.plot(grid, mean.clip(bottom), color=plot_style.COLORS[0])
        low, high = (mean - half).clip(bottom), (mean + half).clip(bottom)
        ax.fill_between(grid, low, high, color=plot_style.COLORS[0], alpha=0.25, lw=0)
        ax.set_yscale("log")
        ax.set_ylim(bottom=2 * bottom)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density (± 95 %)")


@dataclass(frozen=True)
class LogDeterminant:
    """Sum of logarithms of a symmetric operator's positive eigenvalues.

    Attributes:
        value: the sum.
        std_error: standard error over the probes of a stochastic part; 0.0 without one, NaN from a
            single probe.
        quadrature: estimate of that part's error from too few steps (see `Density.trace`; not a
            bound); 0.0 without one.
        converged: whether the eigenvalues met their tolerance and the stochastic part the limits of
            `log_determinant`.
        bound: largest error of the sum if each single eigenvalue is off by its residual; infinite
            where a residual is as large as its eigenvalue.
        count: the number of directions in the sum.
        floor: eigenvalues at most this were left out.
        delta: added to each eigenvalue.
        pairs: the eigenvalues found one by one, if any.
    """

    value: float
    std_error: float
    bound: float
    count: int
    floor: float
    delta: float
    pairs: Eigenpairs | None
    quadrature: float = 0.0
    converged: bool = True

    @property
    def error(self) -> float:
        """Standard error and quadrature's together, without `bound`."""
        return math.hypot(self.std_error, self.quadrature)

    def __str__(self) -> str:
        quadrature = f" ± {self.quadrature:.2g} of quadrature" if self.quadrature else ""
        said = "" if self.converged else f", {NOT_CONVERGED}"
        return (
            f"{self.value:.6g} ± {self.std_error:.2g}{quadrature}, eigenvalues within "
            f"{self.bound:.2g} ({self.count} directions){said}"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("log-determinant", display.with_error(self.value, self.std_error)),
            ("error of quadrature", self.quadrature),
            ("bound of the eigenvalues' errors", self.bound),
            ("directions", self.count),
        ]
        if not self.converged:
            rows.append(("tolerance", NOT_CONVERGED))
        return display.facts(rows)

    def __float__(self) -> float:
        return self.value


def smoothed(grid: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """Gaussians of width sigma at nodes [m], weighted, on a grid [G].  # [G]"""
    z = (grid[:, None] - nodes) / sigma
    return torch.exp(-0.5 * z.square()) @ weights / (sigma * math.sqrt(2 * math.pi))
