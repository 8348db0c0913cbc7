"""Optimizer updates of many replicas at once, as `torch.optim` makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.projected_step import adam_step, sgd_step
from ._settings import ProjectedSGD


class Optimizer:
    """SGD, Nesterov momentum or Adam; each row of parameters is updated as by `torch.optim`.

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
        """Update theta in place; returns the products that `project_step` needs.  # [R, 2, M]

        Args:
            theta, gradient: contiguous.  # [R, P]
            pivots: of the path theta is projected on next; None if it is not.  # [M, P]
            near: segments that `project_step` will be given too.  # [R]
        """
        sgd, first = self._sgd, not self.state
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": sgd.weight_decay}
        common |= {"pivots": pivots, "near": near}
        if sgd.optimizer == "adam":
            if first:
                count = torch.zeros_like(theta[:, 0], dtype=torch.int64)
                self.state = [torch.zeros_like(theta), torch.zeros_like(theta), count]
            common |= {"betas": sgd.betas, "eps": sgd.eps}
            return adam_step(theta, gradient, *self.state, **common)
        if first and sgd.momentum:
            self.state = [torch.zeros_like(theta)]
        buffer, nesterov = self.state[0] if self.state else None, sgd.optimizer == "nesterov"
        common |= {"momentum": sgd.momentum, "nesterov": nesterov, "first": first}
        return sgd_step(theta, gradient, buffer, **common)

    def keep(self, rows: Tensor) -> None:
        """Go on with only these rows of the replicas."""
        self.lr = self.lr[rows]
        self.state = [tensor[rows] for tensor in self.state]
