"""Linear response of projected SGD: what one update's noise does to later ones.

Across a path with stiffness lambda, an update with gradient noise xi is linear in the distance w
from the path and in the momentum buffer b (as `torch.optim.SGD` keeps it):

    g = (lambda + weight decay) w + xi,   b <- momentum b + g,   w <- w - lr (b, or as Nesterov)

and every k updates w is put to 0, b is not. So w is a sum over the updates before of response times
noise, for any k and momentum; plain SGD gives the AR(1) process w <- (1 - lr lambda) w - lr xi.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils import checks
from ..projected_sgd import ProjectedSGD


@dataclass(frozen=True, eq=False)
class Response:
    """Responses of coordinates to noise: entry [i, j, m] is to the noise of update m (from 0).

    Attributes:
        pre_update: of w_i as update j's gradient sees it.  # [r, n, n]
        post_update: of w_i after update j, before any projection.  # [r, n, n]
    """

    pre_update: Tensor
    post_update: Tensor


def response(stiffness: Tensor, settings: ProjectedSGD, *, project: bool = True) -> Response:
    """Linear response of directions of given stiffness over a short run, float64.

    Args:
        stiffness: eigenvalue of the Hessian in each direction, weight decay not included.  # [r]
        settings: of the short run.
        project: whether w is put to 0 every k updates and at the end (not along the path).

    >>> settings = ProjectedSGD(0.5, 1, project_every=2, steps=3)
    >>> response(torch.tensor([1.0]), settings).post_update[0].tolist()
    [[-0.5, 0.0, 0.0], [-0.25, -0.5, 0.0], [0.0, 0.0, -0.5]]
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

    (For a force -1, that is a gradient of +1, the displacement is minus this.) With momentum mu
    a force goes on acting: lr (1 - mu^(n - j)) / (1 - mu).
    """
    return -response(torch.zeros(1), settings, project=False).post_update[0, -1]


@dataclass(frozen=True, eq=False)
class MinibatchCovariance:
    """Covariances of minibatch gradients, per unit of the covariance C of single examples'.

    Minibatches are drawn without replacement within an epoch of floor(N / B) of them: each has
    covariance C (N - B) / (N - 1) / B, and two of one epoch have -C / (N - 1) with each other.
    With B = N there is no noise at all.

    Attributes:
        batch_size, num_examples: B and N.
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
        """sum_j weights_j Cov(w_i, w_l) at update j, per unit of C_il.

        Args:
            left, right: responses of r and of q coordinates.  # [r, n, n], [q, n, n]
            weights: of the updates.  # [n]
            multiplier: of each update's own noise, as a multiple of C; None for 1.  # [n]

        Returns:
            [r, q].
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
        """Noise of each update as a multiple of that on the path, where examples differ in
        curvature: 1 + heterogeneity E |w|^2 / tr C, by recursion.

        Args:
            pre_update: responses.  # [r, n, n]
            variances: C_ii.  # [r]
            heterogeneity: E |(H_e - H) w|^2 / E |w|^2.

        Returns:
            [n].
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
        """sum_j weights_j E[noise of update j in H_il times w_i], per unit of the covariance of
        an example's H_il and gradient: minibatches of one epoch exclude one another.  # [r]"""
        total = torch.zeros(len(pre_update), dtype=torch.float64)
        for epoch in self.epochs(pre_update.shape[-1]):
            weighted = weights[epoch, None] * pre_update[:, epoch, epoch]
            total += self.covariance * weighted.sum((1, 2))
        return total
