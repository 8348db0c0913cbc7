"""Optimizer updates of many replicas at once, as `torch.optim` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.projected_step import adam_step, sgd_step
from ._settings import ProjectedSGD


class Optimizer:
    """SGD (with or without momentum), Nesterov momentum or Adam on rows of parameters.

    Each row gets the update that `torch.optim.SGD` or `torch.optim.Adam` would give it alone;
    weight decay is added to the gradient, as they do. The arithmetic is the fused `ops.step`.

    Args:
        sgd: the settings.
        lr: learning rate of each replica, float64, on theta's device.  # [R]

    >>> optimizer = Optimizer(ProjectedSGD(0.5, 1), torch.tensor([0.5, 1.0]).double())
    >>> theta = torch.ones(2, 1)
    >>> products = optimizer.update(theta, torch.ones(2, 1)); theta.tolist()
    [[0.5], [0.0]]
    """

    def __init__(self, sgd: ProjectedSGD, lr: Tensor) -> None:
        self._sgd, self.lr = sgd, lr
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
        sgd, first = self._sgd, not self.state
        if sgd.optimizer == "adam":
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
                betas=sgd.betas,
                eps=sgd.eps,
                weight_decay=sgd.weight_decay,
                near=near,
            )
        if first and sgd.momentum:
            self.state = [torch.zeros_like(theta)]
        return sgd_step(
            theta,
            gradient,
            self.state[0] if self.state else None,
            lr=self.lr,
            pivots=pivots,
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
            nesterov=sgd.optimizer == "nesterov",
            first=first,
            near=near,
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with only these rows of the replicas."""
        self.lr = self.lr[rows]
        self.state = [tensor[rows] for tensor in self.state]
