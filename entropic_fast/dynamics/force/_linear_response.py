"""Linear response of projected SGD to gradient noise; docs/figures/force.md has the recursion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils import checks
from ..projected_sgd import ProjectedSGD


@dataclass(frozen=True, eq=False)
class Response:
    """Response of coordinate i at update j to a unit of noise at update m: entries [i, j, m]."""

    pre_update: Tensor  # of w_i as update j's gradient sees it  [r, n, n]
    post_update: Tensor  # of w_i after update j, before any projection  [r, n, n]


def response(stiffness: Tensor, settings: ProjectedSGD, *, project: bool = True) -> Response:
    """Linear response over a short run of directions of stiffness [r] without weight decay.

    `project`: whether w is set to 0 every k updates (False along the path).
    """
    if settings.optimizer == "adam":
        raise checks.invalid(
            "optimizer",
            '"sgd" or "nesterov" for linear response',
            '"adam", whose updates are not linear in the noise',
        )
    n, momentum = settings.steps, settings.momentum
    total = stiffness.double().cpu() + settings.weight_decay  # [r]
    w = torch.zeros(len(total), n, dtype=torch.float64)  # of coordinate i to noise m
    buffer = torch.zeros_like(w)
    pre_update, post_update = [], []
    for j in range(n):
        pre_update.append(w)
        gradient = total[:, None] * w
        gradient[:, j] += 1.0
        buffer = momentum * buffer + gradient
        step = gradient + momentum * buffer if settings.optimizer == "nesterov" else buffer
        w = w - settings.rate * step
        post_update.append(w)
        if project and (j + 1) % settings.project_every == 0:
            w = torch.zeros_like(w)
    return Response(torch.stack(pre_update, 1), torch.stack(post_update, 1))


def impulse_response(settings: ProjectedSGD) -> Tensor:
    """Displacement along the path at the end of a short run, for a unit force at update j.  # [n]

    With momentum mu it is lr (1 - mu^(n - j)) / (1 - mu).
    """
    return -response(torch.zeros(1), settings, project=False).post_update[0, -1]


@dataclass(frozen=True, eq=False)
class MinibatchCovariance:
    """Covariances of minibatch gradients, per unit of the covariance C of per-example gradients.

    Minibatches of an epoch are drawn without replacement: each has covariance C (N - B) / (N - 1) /
    B, and two of one epoch have covariance -C / (N - 1). With B = N there is no noise.
    """

    batch_size: int
    num_examples: int

    def __post_init__(self) -> None:
        if not 1 <= checks.integer("batch_size", self.batch_size, 1) <= self.num_examples:
            raise checks.invalid(
                "batch_size",
                f"at most the {self.num_examples} examples there are",
                str(self.batch_size),
            )

    @property
    def covariance(self) -> float:
        """Of two minibatches of one epoch."""
        # All of the examples in one minibatch: an epoch has no other.
        return -1.0 / (self.num_examples - 1) if self.batch_size < self.num_examples else 0.0

    @property
    def variance(self) -> float:
        """Of one minibatch."""
        n, b = self.num_examples, self.batch_size
        return (n - b) / (n - 1) / b if b < n else 0.0

    def _excess(self, multiplier: Tensor | None) -> float | Tensor:
        variance = self.variance if multiplier is None else self.variance * multiplier
        return variance - self.covariance

    def epochs(self, steps: int) -> list[slice]:
        """The updates of each epoch."""
        length = self.num_examples // self.batch_size
        return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]

    def moments(
        self, left: Tensor, right: Tensor, weights: Tensor, multiplier: Tensor | None = None
    ) -> Tensor:
        """sum_j weights_j Cov(w_i, w_l) at update j, per unit of C_il, from responses.  # [r, q]

        `multiplier`: the noise of each update as a multiple of C; None for 1.  # [n]
        """
        excess = self._excess(multiplier)
        weighted = weights[:, None] * left
        factors = torch.einsum("ijm,ljm->il", weighted * excess, right)
        for epoch in self.epochs(left.shape[-1]):
            sums = weighted[..., epoch].sum(-1), right[..., epoch].sum(-1)
            factors = factors + self.covariance * torch.einsum("ij,lj->il", *sums)
        return factors

    def squares(self, responses: Tensor, multiplier: Tensor | None = None) -> Tensor:
        """E w_i^2 at every update, per unit of C_ii.  # [r, n, n] -> [r, n]"""
        excess = self._excess(multiplier)
        squares = (responses.square() * excess).sum(-1)
        for epoch in self.epochs(responses.shape[-1]):
            squares = squares + self.covariance * responses[..., epoch].sum(-1).square()
        return squares

    def noise_multiplier(
        self, pre_update: Tensor, variances: Tensor, heterogeneity: float
    ) -> Tensor:
        """Noise of each update relative to that on the path, 1 + h E |w|^2 / tr C.  # [n]

        For responses [r, n, n], C_ii [r] and h = E |(H_e - H) w|^2 / E |w|^2.
        """
        total = float(variances.sum())
        multiplier = torch.ones(pre_update.shape[-1], dtype=torch.float64)
        if heterogeneity == 0 or total == 0:
            return multiplier
        for j in range(1, len(multiplier)):
            square = self.squares(pre_update[:, j : j + 1], multiplier)[:, 0] @ variances
            multiplier[j] = 1 + heterogeneity * float(square) / total
        return multiplier

    def without_replacement(self, pre_update: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights_j E[noise of H_il at update j, times w_i], per unit covariance.  # [r]"""
        total = torch.zeros(len(pre_update), dtype=torch.float64)
        for epoch in self.epochs(pre_update.shape[-1]):
            weighted = weights[epoch, None] * pre_update[:, epoch, epoch]
            total += self.covariance * weighted.sum((1, 2))
        return total
