"""Optimizer updates of many replicas at once, as `torch.optim` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

OPTIMIZERS = ("sgd", "nesterov", "adam")


class Optimizer:
    """SGD (with or without momentum), Nesterov momentum or Adam on rows of parameters.

    Each row gets the update that `torch.optim.SGD` or `torch.optim.Adam` would give it alone;
    weight decay is added to the gradient, as they do.

    Args:
        name: "sgd", "nesterov" or "adam".
        lr: learning rate of each replica.  # [R]
        momentum: None for the default (0 for "sgd", 0.9 for "nesterov"); not for "adam".
        weight_decay: L2 coefficient.
        betas, eps: Adam's.

    Raises:
        ValueError: an unknown name, or settings that do not fit it.

    >>> optimizer = Optimizer("sgd", torch.tensor([0.5, 1.0]))
    >>> theta = torch.ones(2, 1)
    >>> optimizer.update(theta, torch.ones(2, 1)); theta.tolist()
    [[0.5], [0.0]]
    """

    def __init__(
        self, name: str, lr: Tensor, momentum: float | None = None, weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ) -> None:
        self.name = checks.one_of("optimizer", name, OPTIMIZERS)
        self.lr = lr
        self.weight_decay = float(checks.at_least("weight_decay", weight_decay, 0.0))
        self.eps = float(checks.positive("eps", eps))
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise checks.fail("betas", "two numbers in [0, 1)", repr(betas))
        self.betas = (float(betas[0]), float(betas[1]))
        if momentum is None:
            momentum = 0.9 if name == "nesterov" else 0.0
        elif name == "adam":
            raise checks.fail("momentum", 'None with optimizer="adam"', repr(momentum),
                              "set betas instead")
        if not 0 <= momentum < 1 or (name == "nesterov" and momentum == 0):
            raise checks.fail("momentum", "a number in [0, 1), above 0 for Nesterov",
                              repr(momentum))
        self.momentum = float(momentum)
        self.updates = 0
        self._first: Tensor | None = None   # momentum buffer, or Adam's first moment  # [R, P]
        self._second: Tensor | None = None  # Adam's second moment  # [R, P]

    def update(self, theta: Tensor, gradient: Tensor) -> None:
        """One update of theta, in place.  # [R, P], [R, P]"""
        self.updates += 1
        if self.name == "adam":
            self._adam(theta, gradient)
        else:
            self._sgd(theta, gradient)

    def keep(self, rows: Tensor) -> None:
        """Go on with only these rows of the replicas."""
        self.lr = self.lr[rows]
        self._first = None if self._first is None else self._first[rows]
        self._second = None if self._second is None else self._second[rows]

    def _sgd(self, theta: Tensor, gradient: Tensor) -> None:
        if self.weight_decay:
            gradient = gradient.add(theta, alpha=self.weight_decay)
        if self.momentum:
            if self._first is None:
                self._first = torch.zeros_like(theta)
            self._first.mul_(self.momentum).add_(gradient)
            if self.name == "nesterov":
                gradient = gradient.add(self._first, alpha=self.momentum)
            else:
                gradient = self._first
        theta.addcmul_(self.lr[:, None], gradient, value=-1.0)

    def _adam(self, theta: Tensor, gradient: Tensor) -> None:
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(theta), torch.zeros_like(theta)
        if self.weight_decay:
            gradient = gradient.add(theta, alpha=self.weight_decay)
        b1, b2 = self.betas
        self._first.lerp_(gradient, 1 - b1)
        self._second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        c1, c2 = 1 - b1**self.updates, 1 - b2**self.updates
        denominator = (self._second.sqrt() / c2**0.5).add_(self.eps)
        theta.addcdiv_(self._first * (self.lr / c1)[:, None], denominator, value=-1.0)
