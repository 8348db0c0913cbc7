"""Linear response of projected SGD: what one update's noise does to later ones.

Across a path with stiffness lambda, an update with gradient noise xi is linear in the distance w
from the path and in the momentum buffer b (as `torch.optim.SGD` keeps it):

    g = (lambda + weight decay) w + xi,   b <- momentum b + g,   w <- w - lr (b, or as Nesterov)

and every k updates w is put to 0, b is not. So w is a sum over the updates before of response times
noise, whatever k and momentum; plain SGD gives the AR(1) process w <- (1 - lr lambda) w - lr xi.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks


@dataclass(frozen=True)
class ProjectedSGD:
    """Settings of a burst of projected SGD, as `relax` takes them.

    Attributes:
        lr: learning rate.
        batch_size: B.
        project_every: k, updates between projections.
        steps: updates of the burst; the last is followed by a projection.
        optimizer: "sgd" or "nesterov" (what Adam does is not linear in the noise).
        momentum: None for the default, 0 for "sgd" and 0.9 for "nesterov".
        weight_decay: L2 coefficient.

    Raises:
        ValueError: numbers out of range, or another optimizer.

    >>> ProjectedSGD(0.1, 8).but(project_every=1)
    ProjectedSGD(lr=0.1, batch_size=8, project_every=1, steps=15, optimizer='sgd', momentum=0.0,
    weight_decay=0.0)
    """

    lr: float
    batch_size: int
    project_every: int = 15
    steps: int = 15
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        checks.positive("lr", self.lr)
        for name in ("batch_size", "project_every", "steps"):
            checks.whole(name, getattr(self, name), 1)
        checks.one_of("optimizer", self.optimizer, ("sgd", "nesterov"))
        checks.at_least("weight_decay", self.weight_decay, 0.0)
        if self.momentum is None:
            object.__setattr__(self, "momentum", 0.9 if self.optimizer == "nesterov" else 0.0)
        if not 0 <= self.friction < 1:
            raise checks.fail("momentum", "a number in [0, 1)", repr(self.momentum))

    @property
    def friction(self) -> float:
        """The momentum coefficient."""
        return float(self.momentum or 0.0)

    @property
    def duration(self) -> float:
        """Effective time of the burst, updates times learning rate."""
        return self.steps * self.lr

    def but(self, **changes: object) -> ProjectedSGD:
        """These settings with some changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Response:
    """Responses of coordinates to noise: entry [i, j, m] is to the noise of update m (from 0).

    Attributes:
        seen: of w_i as update j's gradient sees it.  # [r, n, n]
        reached: of w_i after update j, before any projection.  # [r, n, n]
    """

    seen: Tensor
    reached: Tensor


def response(stiffness: Tensor, settings: ProjectedSGD, *, project: bool = True) -> Response:
    """Linear response of directions of given stiffness over a burst, float64.

    Args:
        stiffness: eigenvalue of the Hessian in each direction, weight decay not included.  # [r]
        settings: of the burst.
        project: whether w is put to 0 every k updates and at the end (not along the path).

    >>> settings = ProjectedSGD(0.5, 1, project_every=2, steps=3)
    >>> response(torch.tensor([1.0]), settings).reached[0].tolist()
    [[-0.5, 0.0, 0.0], [-0.25, -0.5, 0.0], [0.0, 0.0, -0.5]]
    """
    n, momentum = settings.steps, settings.friction
    total = stiffness.double().cpu() + settings.weight_decay  # [r]
    w = torch.zeros(len(total), n, dtype=torch.float64)  # of coordinate i to noise m
    buffer = torch.zeros_like(w)
    seen, reached = [], []
    for j in range(n):
        seen.append(w)
        gradient = total[:, None] * w
        gradient[:, j] += 1.0
        buffer = momentum * buffer + gradient
        step = gradient + momentum * buffer if settings.optimizer == "nesterov" else buffer
        w = w - settings.lr * step
        reached.append(w)
        if project and (j + 1) % settings.project_every == 0:
            w = torch.zeros_like(w)
    return Response(torch.stack(seen, 1), torch.stack(reached, 1))


def travel(settings: ProjectedSGD) -> Tensor:
    """Displacement along the path at the end of a burst, for a unit force at update j.  # [n]

    (For a force -1, that is a gradient of +1, the displacement is minus this.) With momentum mu
    a force goes on acting: lr (1 - mu^(n - j)) / (1 - mu).
    """
    return -response(torch.zeros(1), settings, project=False).reached[0, -1]


def noise_factors(
    left: Tensor, right: Tensor, weights: Tensor, batch_size: int, num_examples: int
) -> Tensor:
    """sum_j weights_j Cov(w_i, w_l) at update j, per unit of noise covariance C_il.

    C is the covariance of single examples' gradients over the N examples. Minibatches are drawn
    without replacement within an epoch of floor(N / B) of them: each has covariance
    C (N - B) / (N - 1) / B, and two of one epoch have -C / (N - 1) with each other. B = N gives 0.

    Args:
        left: responses of r coordinates.  # [r, n, n]
        right: of q coordinates.  # [q, n, n]
        weights: of the updates.  # [n]
        batch_size, num_examples: B and N.

    Returns:
        [r, q].
    """
    if batch_size >= num_examples:
        return torch.zeros(len(left), len(right), dtype=torch.float64)
    pair = -1.0 / (num_examples - 1)
    own = (num_examples - batch_size) / (num_examples - 1) / batch_size
    weighted = weights[:, None] * left
    n, per_epoch = left.shape[-1], num_examples // batch_size
    factors = (own - pair) * torch.einsum("ijm,ljm->il", weighted, right)
    for start in range(0, n, per_epoch):
        part = slice(start, start + per_epoch)
        sums = weighted[..., part].sum(-1), right[..., part].sum(-1)
        factors += pair * torch.einsum("ij,lj->il", *sums)
    return factors
