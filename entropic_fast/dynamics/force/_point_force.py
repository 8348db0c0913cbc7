"""The entropic force on projected SGD, from curvature across the path and gradient noise.

Start on the path at s with unit tangent u, and let w be the displacement that minibatch noise has
made since the last projection. To second order in w the gradient of a minibatch along the path is

    u . grad L(s) + u . H w + (1/2) tr((dH/ds) w w^T) + its noise, that of u . H w included,

with d/ds along u, per unit of length. w is linear in the noise (`response`), so E w w^T is a sum
of known factors times C, the covariance of single examples' gradients. Forces along the path:

    energetic   - u . grad L, or what the same burst does without noise (`noiseless_drift`);
    entropic    - (1/2) tr((dH/ds) E w w^T) = - (1/2) d/ds tr(H(s) E w w^T) at fixed E w w^T:
                down the curvature, for k updates a cycle, momentum and weight decay;
    exclusion   - E[u . (H_b - H) w]: minibatches of an epoch are drawn without replacement, so
                one excludes the examples that made w. In all - (lr j / (N - 1)) (1/2) d tr C / ds
                after j updates: down the gradient noise. It is of first order in lr and vanishes
                with 1 / N; the entropic force is of second order at finite k.

Where examples differ in curvature, the noise away from the path is larger than on it, by
E |(H_e - H) w|^2 on average: `noise_heterogeneity` adds it to C in strength, in the shape of C.

With k -> infinity, small lr and noise c in every direction E w w^T -> T H^-1, T = lr c / (2 B):
the force is then - dV/ds of V = (T / 2) log det H across the path (one direction of stiffness g:
(T / 2) log g). With momentum mu, T is 1 / (1 - mu) times as large, and so is the velocity.

Where theory and measurement part. On a path between two digits CNNs (14,378 parameters, loss
under 0.02, B = 8, k = 15) the fitted slope of measured on predicted is 1 within its 95 % interval
(half-widths 0.15 to 0.36) at lr 0.015 to 0.07, at k = 5 and 45 with lr 0.03, and at B = 32 with
lr 0.1. With the noise on the path alone, without spread, it would be 1.1 at lr 0.03 and 1.5 at
0.07: for the stiffest directions E |(H_e - H) v|^2 is some 50 times lambda^2, so that noise away
from the path grows E w^2 by lr^2 E |(H_e - H) v|^2 / B = 0.02 to 0.13 an update at lr 0.03. At lr
0.1 that is 0.3 to 1.5: fluctuations run away (hundreds of times the linear squared distance), the
positions do not fall on one line, and nothing quantitative holds.

Next to a pivot, where a polyline's direction is off the valley's floor, half of the prediction
was measured at two places: E w that noise makes took 10 to 15 % off, and the curvature's change
over the width of the fluctuations themselves (kinks of the network) was a quarter to a half below
its change over `step`. So measure at the middles of segments.

What this leaves out: noise along the path, which makes no mean force at this order; the mean of
w that noise makes where u is no eigenvector of H (u . H E w); and all orders beyond the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._utils import checks
from ..._utils.convergence import held, warn_once
from ..._utils.results import Eigenpairs, Estimate
from ...curvature import HessianOperator, top_eigenvalues
from ...curvature.operators._algebra import ProjectedOperator, orthonormal
from ...objective import Objective
from ...objective._objective import require_objective
from ...paths import Path
from ..projected_sgd import ProjectedSGD
from ._gradient_noise import GradientNoise
from ._linear_response import (
    MinibatchCovariance,
    Response,
    impulse_response,
    response,
)
from ._subsets import as_in_dynamics, first_examples, forms_by_parts, mean_of_parts


@dataclass(frozen=True, eq=False)
class PointForce:
    """Curvature and noise at a point of a path: the forces at any settings follow from these.

    The r directions are the leading eigenvectors of H across the path; "the complement" is what is
    orthogonal to them, one more direction, the last, whose stiffness is that of the noise there.

    Attributes:
        position: relative arc length s.
        length: of the path; lengths below are Euclidean, in the units of the parameters.
        gradient: u . grad L, per unit of length.
        stiffness: eigenvalues lambda_i, and g . H g / g . g of the noise in it.  # [r + 1]
        curvature_slope: v_i . (dH/ds) v_i of the r directions.  # [r]
        covariance: V^T C V in the r directions.  # [r, r]
        noise: c_i, variance of per-example gradients; last the complement's trace.  # [r + 1]
        noise_slope: its change along the path, d/ds at fixed directions.  # [r + 1]
        curvature_moments: C_il (dH/ds)_il, the complement last.  # [r + 1, r + 1]
        curvature_moments_error: standard error of the last entry of `curvature_moments`.
        noise_heterogeneity: E |(H_e - H) w|^2 / E |w|^2 over examples e; 0 if not computed.
        num_examples: N.
        pairs: the eigenpairs.
        max_examples: how many examples the curvature was taken on; None for all.
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
        """Mean velocity of a burst by the entropic force, in path lengths per effective time.

        Args:
            settings: of the burst, which starts here on the path.
            noise_heterogeneity: whether noise grows away from the path.
            complement: whether to add what lies beyond the r directions.

        Returns:
            with the standard error of the part that is sampled.
        """
        found, sampling, multiplier = self._noise(settings, noise_heterogeneity)
        factors = sampling.moments(
            found.pre_update, found.pre_update, impulse_response(settings), multiplier
        )
        scale = -0.5 / (settings.effective_time * self.length)
        total = scale * (factors * self.curvature_moments)
        if not complement:
            return Estimate(float(total[:-1, :-1].sum()), 0.0, len(self.curvature_slope))
        error = abs(scale * float(factors[-1, -1])) * self.curvature_moments_error
        return Estimate(float(total.sum()), error, len(self.curvature_slope))

    def without_replacement(self, settings: ProjectedSGD) -> float:
        """Mean velocity of a burst because minibatches of an epoch exclude one another."""
        found, sampling, _ = self._noise(settings, False)
        factors = sampling.without_replacement(found.pre_update, impulse_response(settings))
        return -0.5 * float(factors @ self.noise_slope) / (settings.effective_time * self.length)

    def squared_distance(
        self, settings: ProjectedSGD, *, noise_heterogeneity: bool = True
    ) -> Tensor:
        """E |w|^2 after each update of a burst, before the projection if one follows.  # [n]"""
        found, sampling, multiplier = self._noise(settings, noise_heterogeneity)
        return self.noise @ sampling.squares(found.post_update, multiplier)

    def temperatures(self, settings: ProjectedSGD) -> Tensor:
        """T_i = lr c_i / (2 B (1 - momentum)) of the r directions, in the loss's units.  # [r]"""
        own = MinibatchCovariance(settings.batch_size, self.num_examples).variance
        return settings.rate * own * self.noise[:-1] / (2 * (1 - settings.momentum))

    def stationary(self, settings: ProjectedSGD) -> float:
        """Entropic velocity for k -> infinity, small lr: - (1/2) sum_i T_i d ln lambda_i / ds.

        Over the r directions, each of its own temperature; NaN if one has no restoring force.
        """
        return self._drift(self.temperatures(settings), settings)

    def potential(self, settings: ProjectedSGD) -> float:
        """As `stationary` with one temperature, the mean: - (T / 2) d/ds log det H of the r
        directions."""
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
        found = response(stiffness, settings)
        size = self.noise_heterogeneity if noise_heterogeneity else 0.0
        return found, sampling, sampling.noise_multiplier(found.pre_update, self.noise, size)


@full_precision()
def point_force(
    obj: Objective,
    path: Path,
    position: float,
    *,
    directions: int = 16,
    complement_examples: int = 16,
    heterogeneity_draws: int = 2,
    step: float = 0.003,
    tol: float = 1e-2,
    seed: int = 0,
    v0: Tensor | Eigenpairs | None = None,
    max_examples: int | None = None,
) -> PointForce:
    """Curvature across the path, its change along it, and the gradient noise, at one position.

    Costs 2 (r + complement_examples) products besides those of the eigenpairs, and 3 + 2
    heterogeneity_draws passes of per-example gradients.

    Layers that normalize by batch statistics: give the objective that the dynamics has,
    `obj.with_norm("batch").with_data(obj.tensors(), batch_size=B)`; its examples are taken in a
    random order, for batches like those of the dynamics. With `norm="running"` the statistics
    re-estimated at each point are used: an approximation.

    Args:
        obj: the loss and the data.
        path: in its parameters.
        position: s, with s +- step inside [0, 1].
        directions: r, eigenvectors of the Hessian across the path, at most P - 1.
        complement_examples: how many examples' gradients, less their part in the r directions, are
            drawn to find what the complement contributes; 0 to leave it out.
        heterogeneity_draws: random directions for `noise_heterogeneity`; 0 for none.
        step: changes along the path are central differences over +- step path lengths along u.
            Networks with kinks have none but over a distance: choose it near that from the path.
        tol: of the eigenpairs. They need not be exact: the force is a trace over their span.
        seed: of the Lanczos vectors and the samples.
        v0: to start from, such as the pairs of a neighboring position.
        max_examples: curvature from so many examples (with batch statistics whole batches of
            the random order); None for all. The r directions take the first ones. Samples of
            the complement are dealt out to parts of the data as large, which their error includes.
            The noise is always that of all, because near a minimum a few may make most of it.

    Raises:
        ValueError: arguments out of range; with `norm="batch"` fewer than two batches.
    """
    require_objective(obj)
    if not (step > 0 and step <= position <= 1 - step):
        raise checks.invalid(
            "position",
            f"s with s +- step ({step:g}) in [0, 1]",
            checks.shown(position),
            "lower step",
        )
    checks.integer("directions", directions, 1)
    checks.integer("complement_examples", complement_examples)
    checks.integer("heterogeneity_draws", heterogeneity_draws)
    obj.count(max_examples)  # refuses a wrong one before anything is computed
    num_examples = obj.num_examples
    obj = as_in_dynamics(obj)
    theta, tangent = path.point(position), path.tangent(position)
    u = orthonormal(tangent, obj.num_params, tangent.dtype, tangent.device, "tangent")
    spacing = step * path.length

    def at(point: Tensor) -> Objective:
        return obj.recalibrated(point) if obj.norm == "running" else obj

    here, places = at(theta), [theta + sign * spacing * tangent for sign in (1, -1)]
    beside = [at(place) for place in places]
    sides = [
        HessianOperator(first_examples(side, max_examples), place)
        for side, place in zip(beside, places, strict=True)
    ]
    across = ProjectedOperator(HessianOperator(first_examples(here, max_examples), theta), u)
    with held() as missed:
        pairs = top_eigenvalues(across, directions, tol, seed, v0=v0)
    warn_once(missed, f"point_force at s = {position:.4g}:")
    vectors = pairs.vectors
    ahead, behind = ((side @ vectors).double() for side in sides)
    turned = (ahead - behind) / (2 * spacing)  # [P, r], (dH/ds) V
    slopes = vectors.double().T @ turned

    noise = GradientNoise(here, theta, u, vectors, turned, heterogeneity_draws, seed)
    ahead_noise, behind_noise = (
        GradientNoise(side, place, u, vectors).variances
        for side, place in zip(beside, places, strict=True)
    )
    curvature_moments = torch.zeros(directions + 1, directions + 1, dtype=torch.float64)
    curvature_moments[:-1, :-1] = (noise.covariance * slopes).cpu()
    stiffness = error = 0.0
    if complement_examples and noise.complement > 0:
        sample = noise.sample(complement_examples, seed)  # [P, E]
        ahead_forms, behind_forms = (
            forms_by_parts(side, place, sample, max_examples)
            for side, place in zip(beside, places, strict=True)
        )
        forms = ahead_forms + behind_forms
        stiffness = float(0.5 * forms.nansum() / sample.double().square().sum())
        curvature_moments[:-1, -1] = curvature_moments[-1, :-1] = noise.cross.cpu()
        change, error = mean_of_parts((ahead_forms - behind_forms) / (2 * spacing))
        curvature_moments[-1, -1] = change
        if sample.shape[1] >= noise.count and len(ahead_forms) == 1:
            error = 0.0  # nothing was sampled
    return PointForce(
        position=float(position),
        length=path.length,
        gradient=float(tangent.double() @ here.gradient(theta).double()),
        stiffness=torch.cat([pairs.values.double().cpu(), torch.tensor([stiffness]).double()]),
        curvature_slope=slopes.diagonal().cpu().clone(),
        covariance=noise.covariance.cpu(),
        noise=noise.variances,
        noise_slope=(ahead_noise - behind_noise) / (2 * spacing),
        curvature_moments=curvature_moments,
        curvature_moments_error=error,
        noise_heterogeneity=noise.heterogeneity(spacing),
        num_examples=num_examples,
        pairs=pairs,
        max_examples=max_examples,
    )
