"""Optimizer updates of many replicas at once, as `torch.optim` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._utils import checks
from ...ops.projected_step import adam_step, sgd_step

OPTIMIZERS = ("sgd", "nesterov", "adam")


class Optimizer:
    """SGD (with or without momentum), Nesterov momentum or Adam on rows of parameters.

    Each row gets the update that `torch.optim.SGD` or `torch.optim.Adam` would give it alone;
    weight decay is added to the gradient, as they do. The arithmetic is the fused `ops.step`.

    Args:
        name: "sgd", "nesterov" or "adam".
        lr: learning rate of each replica, float64, on theta's device.  # [R]
        momentum: None for the default (0 for "sgd", 0.9 for "nesterov"); not for "adam".
        weight_decay: L2 coefficient.
        betas, eps: Adam's.

    Raises:
        ValueError: an unknown name, or settings that do not fit it.

    >>> optimizer = Optimizer("sgd", torch.tensor([0.5, 1.0]).double())
    >>> theta = torch.ones(2, 1)
    >>> products = optimizer.update(theta, torch.ones(2, 1)); theta.tolist()
    [[0.5], [0.0]]
    """

    def __init__(
        self,
        name: str,
        lr: Tensor,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.name = checks.one_of("optimizer", name, OPTIMIZERS)
        self.lr = lr
        self.weight_decay = float(checks.at_least("weight_decay", weight_decay, 0.0))
        self.eps = float(checks.positive("eps", eps))
        pair = checks.numbers("betas", betas)
        if len(pair) != 2 or not all(0 <= b < 1 for b in pair):
            raise checks.invalid("betas", "two numbers in [0, 1)", checks.shown(betas))
        self.betas = (float(betas[0]), float(betas[1]))
        if momentum is None:
            momentum = 0.9 if name == "nesterov" else 0.0
        elif name == "adam":
            raise checks.invalid(
                "momentum",
                'None with optimizer="adam"',
                checks.shown(momentum),
                "set betas instead",
            )
        checks.share("momentum", momentum)
        if name == "nesterov" and momentum == 0:
            raise checks.invalid(
                "momentum", "a number above 0 for Nesterov", checks.shown(momentum)
            )
        self.momentum = float(momentum)
        # Momentum buffer; for Adam both moments and the count of updates. Made at the first.
        self.state: list[Tensor] = []

    def update(
        self,
        theta: Tensor,
        gradient: Tensor,
        pivots: Tensor | None = None,
        near: Tensor | None = None,
    ) -> Tensor:
        """One update of theta, in place.

        Args:
            theta, gradient: contiguous.  # [R, P]
            pivots: of the path theta is projected on next; None if it is not.  # [M, P]
            near: segments that `ops.step.project_step` will be given too.  # [R]

        Returns:
            the products that `ops.step.project_step` needs.  # [R, 2, M]
        """
        first = not self.state
        if self.name == "adam":
            if first:
                count = torch.zeros_like(theta[:, 0], dtype=torch.int64)
                self.state = [torch.zeros_like(theta), torch.zeros_like(theta), count]
            mean, square, count = self.state
            return adam_step(
                theta,
                gradient,
                mean,
                square,
                count,
                lr=self.lr,
                pivots=pivots,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                near=near,
            )
        if first and self.momentum:
            self.state = [torch.zeros_like(theta)]
        return sgd_step(
            theta,
            gradient,
            self.state[0] if self.state else None,
            lr=self.lr,
            pivots=pivots,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.name == "nesterov",
            first=first,
            near=near,
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with only these rows of the replicas."""
        self.lr = self.lr[rows]
        self.state = [part[rows] for part in self.state]
