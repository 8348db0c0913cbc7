"""The entropic force on projected SGD, from curvature across the path and gradient noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.results import Eigenpairs, Estimate
from ...curvature import HessianOperator, top_eigenvalues
from ...curvature.operators import ProjectedOperator, orthonormal
from ...objective import Objective
from ...paths import Path
from ..projected_sgd import ProjectedSGD, check_path
from ._gradient_noise import GradientNoise
from ._linear_response import MinibatchCovariance, Response, impulse_response, response
from ._subsets import as_in_dynamics, first_examples, forms_by_parts, mean_of_parts


@dataclass(frozen=True)
class ForceSettings:
    """How the force at a point is predicted.

    Args:
        directions: r, eigenvectors of the Hessian across the path, at most P - 1.
        complement_examples: how many examples' gradients, projected off the r directions, are
            sampled for the contribution of the complement; 0 to leave it out.
        heterogeneity_draws: random directions for `PointForce.noise_heterogeneity`; 0 for none.
        step: changes along the path are central differences over +- step path lengths along u. For
            networks with kinks choose it near the size of the fluctuations.
        tol: of the eigenpairs. They need not be accurate: the force is a trace over their span.
        max_examples: examples for the curvature (with batch statistics whole batches of the random
            order); None for all. The r directions use the first ones; samples of the complement are
            distributed over disjoint subsets of this size, which their error includes. The noise
            always uses all examples, because a few may dominate it.
    """

    directions: int = 16
    complement_examples: int = 16
    heterogeneity_draws: int = 2
    step: float = 0.003
    tol: float = 1e-2
    max_examples: int | None = None

    def __post_init__(self) -> None:
        checks.integer("directions", self.directions, 1)
        checks.integer("complement_examples", self.complement_examples)
        checks.integer("heterogeneity_draws", self.heterogeneity_draws)
        checks.positive("step", self.step)
        checks.positive("tol", self.tol)
        if self.max_examples is not None:
            checks.integer("max_examples", self.max_examples, 1)


@dataclass(frozen=True, eq=False)
class PointForce:
    """Curvature and noise at a point of a path, which determine the forces for any settings.

    The r directions are the leading eigenvectors of H across the path. The orthogonal complement
    counts as one more direction, the last, with the stiffness that its noise has.
    docs/figures/force.md derives the predictions.

    Attributes:
        position: relative arc length s.
        length: of the path; lengths below are Euclidean, in the units of the parameters.
        gradient: u . grad L, per unit of length.
        stiffness: eigenvalues lambda_i; last g . H g / g . g of the complement's noise.  # [r + 1]
        curvature_slope: v_i . (dH/ds) v_i of the r directions.  # [r]
        covariance: V^T C V in the r directions.  # [r, r]
        noise: c_i, variance of per-example gradients; last the complement's trace.  # [r + 1]
        noise_slope: its change along the path, d/ds at fixed directions.  # [r + 1]
        curvature_moments: C_il (dH/ds)_il, the complement last.  # [r + 1, r + 1]
        curvature_moments_error: standard error of the last entry of `curvature_moments`.
        noise_heterogeneity: E |(H_e - H) w|^2 / E |w|^2 over examples e; 0 if not computed.
        num_examples: N.
        pairs: the eigenpairs.
        max_examples: the number of examples used for the curvature; None for all.
    """

    position: float
    length: float
    gradient: float
    stiffness: Tensor
    curvature_slope: Tensor
    covariance: Tensor
    noise: Tensor
    noise_slope: Tensor
    curvature_moments: Tensor
    curvature_moments_error: float
    noise_heterogeneity: float
    num_examples: int
    pairs: Eigenpairs
    max_examples: int | None = None

    @property
    def noise_share(self) -> float:
        """Share of the noise across the path, tr C, that lies in the r directions."""
        return 1.0 - float(self.noise[-1] / self.noise.sum()) if self.noise.sum() > 0 else 1.0

    @property
    def energetic(self) -> float:
        """- u . grad L: velocity in path lengths per effective time, for momentum 0."""
        return -self.gradient / self.length

    def entropic(
        self, settings: ProjectedSGD, *, noise_heterogeneity: bool = True, complement: bool = True
    ) -> Estimate:
        """Mean velocity of a short run by the entropic force, in path lengths per effective time.

        Args:
            settings: of the short run, which starts here on the path.
            noise_heterogeneity: whether noise grows away from the path.
            complement: whether to add the directions beyond the first r.

        Returns:
            with the standard error of the sampled part.
        """
        responses, sampling, multiplier = self._noise(settings, noise_heterogeneity)
        factors = sampling.moments(
            responses.pre_update, responses.pre_update, impulse_response(settings), multiplier
        )
        scale = -0.5 / (settings.effective_time * self.length)
        total = scale * (factors * self.curvature_moments)
        if not complement:
            return Estimate(float(total[:-1, :-1].sum()), 0.0, len(self.curvature_slope))
        error = abs(scale * float(factors[-1, -1])) * self.curvature_moments_error
        return Estimate(float(total.sum()), error, len(self.curvature_slope))

    def without_replacement(self, settings: ProjectedSGD) -> float:
        """Mean velocity of a short run because minibatches of an epoch exclude one another."""
        responses, sampling, _ = self._noise(settings, False)
        factors = sampling.without_replacement(responses.pre_update, impulse_response(settings))
        return -0.5 * float(factors @ self.noise_slope) / (settings.effective_time * self.length)

    def squared_distance(
        self, settings: ProjectedSGD, *, noise_heterogeneity: bool = True
    ) -> Tensor:
        """E |w|^2 after each update of a short run, before the projection if one follows.  # [n]"""
        responses, sampling, multiplier = self._noise(settings, noise_heterogeneity)
        return self.noise @ sampling.squares(responses.post_update, multiplier)

    def temperatures(self, settings: ProjectedSGD) -> Tensor:
        """T_i = lr c_i / (2 B (1 - momentum)) of the r directions, in the loss's units.  # [r]"""
        variance = MinibatchCovariance(settings.batch_size, self.num_examples).variance
        return settings.rate * variance * self.noise[:-1] / (2 * (1 - settings.momentum))

    def stationary(self, settings: ProjectedSGD) -> float:
        """Entropic velocity for k -> infinity, small lr: - (1/2) sum_i T_i d ln lambda_i / ds.

        Over the r directions, each at its own temperature; NaN if one has no restoring force.
        """
        return self._drift(self.temperatures(settings), settings)

    def potential(self, settings: ProjectedSGD) -> float:
        """As `stationary` at the mean temperature: - (T / 2) d/ds log det H of the r directions."""
        temperatures = self.temperatures(settings)
        return self._drift(temperatures.mean().expand_as(temperatures), settings)

    def _drift(self, temperatures: Tensor, settings: ProjectedSGD) -> float:
        stiffness = self.stiffness[:-1]
        logs = torch.where(stiffness > 0, self.curvature_slope / stiffness, torch.nan)
        return -0.5 * float(temperatures @ logs) / (1 - settings.momentum) / self.length

    def _noise(
        self, settings: ProjectedSGD, noise_heterogeneity: bool
    ) -> tuple[Response, MinibatchCovariance, Tensor]:
        sampling = MinibatchCovariance(settings.batch_size, self.num_examples)
        # Directions of negative curvature hold little noise; the complement's mean is not below 0.
        stiffness = torch.cat([self.stiffness[:-1], self.stiffness[-1:].clamp(min=0)])
        responses = response(stiffness, settings)
        size = self.noise_heterogeneity if noise_heterogeneity else 0.0
        multiplier = sampling.noise_multiplier(responses.pre_update, self.noise, size)
        return responses, sampling, multiplier


@full_precision()
def point_force(
    obj: Objective,
    path: Path,
    position: float,
    settings: ForceSettings = ForceSettings(),
    *,
    seed: int = 0,
    v0: Tensor | Eigenpairs | None = None,
) -> PointForce:
    """Compute the curvature across the path, its change along it, and the gradient noise.

    Costs 2 (r + complement_examples) products besides the eigenpairs, and 3 + 2 heterogeneity_draws
    passes of per-example gradients.

    With batch statistics pass the objective of the dynamics,
    `obj.with_norm("batch").with_data(obj.tensors(), batch_size=B)`, whose examples are then batched
    in a random order. With `norm="running"` the statistics are re-estimated at each point, an
    approximation.

    Args:
        obj: the loss and the data.
        path: in its parameters.
        position: s, with s +- step inside [0, 1].
        settings: how the force is predicted.
        seed: of the Lanczos vectors and the samples.
        v0: initial vectors, such as the pairs of a neighboring position.

    Raises:
        ValueError: arguments out of range; with `norm="batch"` fewer than two batches.
    """
    check_path(obj, path)
    checks.instance("settings", settings, ForceSettings)
    checks.at_least("position", position, 0.0)
    step = settings.step
    if not step <= position <= 1 - step:
        raise checks.invalid(
            "position",
            f"s with s +- step ({step:g}) in [0, 1]",
            checks.shown(position),
            "lower step",
        )
    obj.count(settings.max_examples)  # rejects too many before anything is computed
    sites = _Sites.along(as_in_dynamics(obj), path, position, settings)
    pairs, change = _leading_directions(sites, position, seed, v0)
    slopes = pairs.vectors.double().T @ change
    noise = GradientNoise(
        sites.here,
        sites.theta,
        sites.tangent_column,
        pairs.vectors,
        change,
        settings.heterogeneity_draws,
        seed,
    )
    ahead, behind = (
        GradientNoise(side, place, sites.tangent_column, pairs.vectors).variances
        for side, place in zip(sites.beside, sites.places, strict=True)
    )
    moments = torch.zeros([settings.directions + 1] * 2, dtype=torch.float64)
    moments[:-1, :-1] = (noise.covariance * slopes).cpu()
    stiffness = error = 0.0
    if settings.complement_examples and noise.complement > 0:
        moments[:-1, -1] = moments[-1, :-1] = noise.cross.cpu()
        stiffness, moments[-1, -1], error = _complement(sites, noise, seed)
    return PointForce(
        position=float(position),
        length=path.length,
        gradient=float(sites.tangent.double() @ sites.here.gradient(sites.theta).double()),
        stiffness=torch.cat([pairs.values.double().cpu(), torch.tensor([stiffness]).double()]),
        curvature_slope=slopes.diagonal().cpu().clone(),
        covariance=noise.covariance.cpu(),
        noise=noise.variances,
        noise_slope=(ahead - behind) / (2 * sites.spacing),
        curvature_moments=moments,
        curvature_moments_error=error,
        noise_heterogeneity=noise.heterogeneity(sites.spacing),
        num_examples=obj.num_examples,
        pairs=pairs,
        max_examples=settings.max_examples,
    )


@dataclass(frozen=True, eq=False)
class _Sites:
    """A point of the path, two points beside it along the tangent, and the objective at each."""

    settings: ForceSettings
    theta: Tensor
    tangent: Tensor
    tangent_column: Tensor
    spacing: float
    here: Objective
    places: list[Tensor]
    beside: list[Objective]

    @classmethod
    def along(cls, obj: Objective, path: Path, position: float, settings: ForceSettings) -> _Sites:
        theta, tangent = path.point(position), path.tangent(position)
        column = orthonormal(tangent, obj.num_params, tangent.dtype, tangent.device, "tangent")
        spacing = settings.step * path.length

        def at(point: Tensor) -> Objective:
            return obj.recalibrated(point) if obj.norm == "running" else obj

        here, places = at(theta), [theta + sign * spacing * tangent for sign in (1, -1)]
        beside = [at(place) for place in places]
        return cls(settings, theta, tangent, column, spacing, here, places, beside)


def _leading_directions(
    sites: _Sites, position: float, seed: int, v0: Tensor | Eigenpairs | None
) -> tuple[Eigenpairs, Tensor]:
    """Eigenpairs V of the Hessian H across the path, and (dH/ds) V of shape [P, r]."""
    settings = sites.settings
    hessian = HessianOperator(first_examples(sites.here, settings.max_examples), sites.theta)
    with held() as missed:
        across = ProjectedOperator(hessian, sites.tangent_column)
        pairs = top_eigenvalues(across, settings.directions, settings.tol, seed, v0=v0)
    warn_once(missed, f"point_force at s = {position:.4g}:")
    ahead, behind = (
        (
            HessianOperator(first_examples(side, settings.max_examples), place) @ pairs.vectors
        ).double()
        for side, place in zip(sites.beside, sites.places, strict=True)
    )
    return pairs, (ahead - behind) / (2 * sites.spacing)


def _complement(sites: _Sites, noise: GradientNoise, seed: int) -> tuple[float, float, float]:
    """Stiffness of the noise beyond the r directions, its change along the path, and its error."""
    settings = sites.settings
    sample = noise.sample(settings.complement_examples, seed)  # [P, E]
    ahead, behind = (
        forms_by_parts(side, place, sample, settings.max_examples)
        for side, place in zip(sites.beside, sites.places, strict=True)
    )
    stiffness = float(0.5 * (ahead + behind).nansum() / sample.double().square().sum())
    change, error = mean_of_parts((ahead - behind) / (2 * sites.spacing))
    if sample.shape[1] >= noise.count and len(ahead) == 1:
        error = 0.0  # nothing was sampled
    return stiffness, change, error
