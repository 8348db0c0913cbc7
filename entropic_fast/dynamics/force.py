"""The entropic force on projected SGD, from curvature across the path and gradient noise.

Start on the path at s with unit tangent u, and let w be the displacement that minibatch noise has
made since the last projection. To second order in w the mean gradient along the path is

    u . grad L(s) + u . H w + (1/2) tr((dH/ds) w w^T),        d/ds along u, per unit of length,

and w is linear in the noise (`response`), so E w w^T is a sum of known factors times C, the
covariance of single examples' gradients. The force along the path is thus

    energetic:   - u . grad L        (and what the same burst does without noise)
    entropic:    - (1/2) tr((dH/ds) Cov(w))  =  - (1/2) d/ds tr(H(s) Cov(w)) at fixed Cov(w),

for k updates a cycle, momentum and weight decay included. With k -> infinity, small lr and noise
c in every direction Cov(w) -> T H^-1 with T = lr c / (2 B): the force is then - dV/ds with
V = (T / 2) log det H across the path (one direction of stiffness g: (T / 2) log g).

What this leaves out: noise along the path (it makes no mean force at this order); E w itself,
which noise shifts where the path's tangent is no eigenvector of H (u . H E w); that examples
differ in curvature (noise proportional to w), and that minibatches of an epoch exclude one
another, beyond Cov(w); all orders beyond the second. The last four grow with lr / B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..curvature import HessianOperator, top_eigenvalues
from ..curvature.across import Across, orthonormal, without
from ..curvature.per_example import ExampleGradients
from ..curvature.protocol import multiply, quadratic_forms
from ..objective import Objective
from ..paths.path import Path
from ..random import derive, permutation
from ..results import Eigenpairs, Estimate
from .response import ProjectedSGD, noise_factors, response, travel


@dataclass(frozen=True, eq=False)
class PointForce:
    """Curvature and noise at a point of a path: the force at any settings follows from these.

    The r directions are the leading eigenvectors of H across the path; "the rest" is what is
    orthogonal to them, taken as one more direction whose stiffness is that of the noise there.

    Attributes:
        position: relative arc length s.
        length: of the path; lengths below are Euclidean, in the units of the parameters.
        gradient: u . grad L, per unit of length.
        stiffness: eigenvalues lambda_i of the r directions.  # [r]
        slope: v_i . (dH/ds) v_i, their change along the path.  # [r]
        noise: c_i, variance of single examples' gradients along v_i.  # [r]
        rest_stiffness: g . H g / g . g of the noise in the rest.
        rest_noise: trace of C in the rest.
        pull: C_il (dH/ds)_il of the r directions, and of the rest in the last row and column:
            the force is - (1/2) sum_il factors_il pull_il.  # [r + 1, r + 1]
        rest_error: standard error of the last entry of `pull`, over the examples sampled.
        num_examples: N.
        pairs: the eigenpairs.
    """

    position: float
    length: float
    gradient: float
    stiffness: Tensor
    slope: Tensor
    noise: Tensor
    rest_stiffness: float
    rest_noise: float
    pull: Tensor
    rest_error: float
    num_examples: int
    pairs: Eigenpairs

    @property
    def noise_share(self) -> float:
        """Share of the noise across the path, tr C, that lies in the r directions."""
        inside = float(self.noise.sum())
        return inside / (inside + self.rest_noise)

    def entropic(self, settings: ProjectedSGD, *, rest: bool = True) -> Estimate:
        """Mean velocity of a burst by the entropic force, in path lengths per effective time.

        Args:
            settings: of the burst, whose start is at rest on the path here.
            rest: whether to add what lies beyond the r directions.

        Returns:
            with the standard error of the part that is sampled.
        """
        if settings.batch_size > self.num_examples:
            raise checks.fail(
                "settings.batch_size",
                f"at most the {self.num_examples} examples there are",
                str(settings.batch_size),
            )
        last = torch.tensor([max(self.rest_stiffness, 0.0)], dtype=torch.float64)
        seen = response(torch.cat([self.stiffness, last]), settings).seen
        factors = noise_factors(
            seen, seen, travel(settings), settings.batch_size, self.num_examples
        )
        scale = -0.5 / (settings.duration * self.length)
        total = scale * (factors * self.pull)
        if not rest:
            return Estimate(float(total[:-1, :-1].sum()), 0.0, len(self.stiffness))
        error = abs(scale * float(factors[-1, -1])) * self.rest_error
        return Estimate(float(total.sum()), error, len(self.stiffness))

    def stationary(self, settings: ProjectedSGD) -> float:
        """The entropic velocity of the r directions for k -> infinity and small lr.

        - (1/2) sum_i T_i d ln(lambda_i) / ds with T_i = lr c_i / (2 B (1 - momentum)), which is
        - dV/ds for V = (1/2) sum_i T_i ln lambda_i; a drift is as many times faster with
        momentum. Infinite without a restoring force in some direction: NaN there.
        """
        temperature = self.temperatures(settings)
        return self._drift(0.5 * (temperature * self._log_slope()).sum(), settings)

    def potential(self, settings: ProjectedSGD) -> float:
        """As `stationary` with one temperature for all: - (T / 2) d/ds log det H of the r
        directions, T = lr / (2 B) times the mean of their noise."""
        temperature = self.temperatures(settings).mean()
        return self._drift(0.5 * temperature * self._log_slope().sum(), settings)

    def temperatures(self, settings: ProjectedSGD) -> Tensor:
        """T_i = lr c_i / (2 B (1 - momentum)), in the loss's units.  # [r]"""
        share = (self.num_examples - settings.batch_size) / max(1, self.num_examples - 1)
        noise = self.noise * share / settings.batch_size
        return settings.lr * noise / (2 * (1 - settings.friction))

    def _log_slope(self) -> Tensor:
        positive = self.stiffness > 0
        return torch.where(positive, self.slope / self.stiffness, torch.nan)

    def _drift(self, slope: Tensor, settings: ProjectedSGD) -> float:
        return -float(slope) / (1 - settings.friction) / self.length


def point_force(
    obj: Objective,
    path: Path,
    position: float,
    *,
    directions: int = 16,
    rest_examples: int = 32,
    step: float = 0.01,
    tol: float = 1e-2,
    seed: int = 0,
    v0: Tensor | Eigenpairs | None = None,
    max_examples: int | None = None,
) -> PointForce:
    """Curvature across the path, its change along it, and the gradient noise, at one position.

    About 2 (r + rest_examples) products besides those of the eigenpairs, and one gradient of
    each example. Layers with running statistics use those re-estimated at each point: for
    dynamics with batch statistics an approximation.

    Args:
        obj: the loss and the data; an example's loss must depend on that example alone.
        path: in its parameters.
        position: s, with s +- step inside [0, 1].
        directions: r, eigenvectors of the Hessian across the path, at most P - 1.
        rest_examples: how many examples' gradients, less their part in the r directions, are
            taken to find what the rest contributes; 0 to leave the rest out of `pull`.
        step: the curvature's change is a central difference over +- step path lengths along u.
        tol: of the eigenpairs. They need not be exact: the force is a trace over their span.
        seed: of the Lanczos vectors and the sample.
        v0: to start from, such as the pairs of a neighbouring position.
        max_examples: curvature and noise from the first so many examples; None for all. The
            pairs of minibatches are those of all.

    Raises:
        ValueError: arguments out of range; examples that influence one another.
    """
    if not (0 < step and step <= position <= 1 - step):
        raise checks.fail(
            "position", f"s with s +- step ({step:g}) in [0, 1]", repr(position), "lower step"
        )
    checks.whole("directions", directions, 1)
    checks.whole("rest_examples", rest_examples)
    count = obj.count(max_examples)
    theta, tangent = path.point(position), path.tangent(position)
    u = orthonormal(tangent, obj.num_params, tangent.dtype, tangent.device, "tangent")
    spacing = step * path.length
    energetic = float(tangent.double() @ obj.recalibrated(theta).gradient(theta).double())

    def at(point: Tensor) -> Objective:
        here = obj.recalibrated(point)
        return here if count == obj.num_examples else _first(here, count)

    ahead, behind = (
        HessianOperator(at(point), point)
        for point in (theta + spacing * tangent, theta - spacing * tangent)
    )
    here = at(theta)
    pairs = top_eigenvalues(
        Across(HessianOperator(here, theta), u), directions, tol, seed, v0=v0
    )
    vectors = pairs.vectors
    turned = (
        multiply(ahead, vectors).double() - multiply(behind, vectors).double()
    ) / (2 * spacing)  # [P, r], (dH/ds) V
    slopes = vectors.double().T @ turned

    gradients = _Noise(here, theta, u, vectors, turned, rest_examples, seed)
    size = directions + 1
    pull = torch.zeros(size, size, dtype=torch.float64)
    pull[:-1, :-1] = (gradients.covariance * slopes).cpu()
    stiffness, value, error = 0.0, 0.0, 0.0
    if rest_examples:
        rows = gradients.sample.T.contiguous()
        forms = [quadratic_forms(operator, rows).cpu() for operator in (ahead, behind)]
        change = (forms[0] - forms[1]) / (2 * spacing)
        squares = float(gradients.sample.double().square().sum())
        stiffness = float(0.5 * (forms[0] + forms[1]).sum()) / squares if squares else 0.0
        value = float(change.mean())
        error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else torch.nan
        pull[:-1, -1] = pull[-1, :-1] = gradients.cross.cpu()
        pull[-1, -1] = value
    return PointForce(
        position=float(position),
        length=path.length,
        gradient=energetic,
        stiffness=pairs.values.double().cpu(),
        slope=slopes.diagonal().cpu().clone(),
        noise=gradients.covariance.diagonal().cpu().clone(),
        rest_stiffness=stiffness,
        rest_noise=gradients.rest,
        pull=pull,
        rest_error=error,
        num_examples=obj.num_examples,
        pairs=pairs,
    )


def _first(obj: Objective, count: int) -> Objective:
    inputs, targets = obj.tensors()
    return obj.with_data((inputs[:count], targets[:count]))


class _Noise:
    """Second moments of single examples' gradients about their mean, across the path.

    Attributes:
        covariance: in the r directions.  # [r, r]
        cross: mean of (v_i . g) ((dH/ds) v_i . rest of g).  # [r]
        rest: trace in the rest.
        sample: the rest of some examples' gradients.  # [E, P]
    """

    def __init__(
        self,
        obj: Objective,
        theta: Tensor,
        u: Tensor,
        vectors: Tensor,
        turned: Tensor,
        examples: int,
        seed: int,
    ) -> None:
        n = obj.num_examples
        mean = obj.gradient(theta)
        chosen = permutation(n, derive(seed, "force", "rest"), 0)[: min(examples, n)]
        r = vectors.shape[1]
        self.covariance = torch.zeros(r, r, dtype=torch.float64, device=theta.device)
        self.cross = torch.zeros(r, dtype=torch.float64, device=theta.device)
        self.rest = 0.0
        sample = []
        across = torch.cat([u, vectors], 1)
        for start, rows in ExampleGradients(obj, theta).chunks():
            rows = without(u, (rows - mean).T)  # [P, n]
            inside = (vectors.T @ rows).double()  # [r, n]
            rest = without(across, rows)
            self.covariance += inside @ inside.T / n
            self.cross += (inside * (turned.to(rest.dtype).T @ rest).double()).sum(1) / n
            self.rest += float(rest.double().square().sum()) / n
            mine = chosen[(chosen >= start) & (chosen < start + rows.shape[1])] - start
            sample.append(rest[:, mine.to(rest.device)].T)
        self.sample = torch.cat(sample)
