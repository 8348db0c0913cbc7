"""Losses over all examples and over fixed sets, at the points and steps where they are due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._utils import checks
from ...objective import Objective


class Evaluation:
    """What to evaluate, and when.

    Args:
        obj: the objective, in the normalization mode of the dynamics.
        fixed_sets: other data, by name.
        loss_every: updates between losses over all examples of `obj`; None for never.
        fixed_every: updates between losses over the fixed sets.

    >>> obj = Objective(torch.nn.Linear(1, 1), "mse", (torch.ones(4, 1), torch.ones(4, 1)))
    >>> held_out = torch.ones(2, 1), 3 * torch.ones(2, 1)
    >>> evaluation = Evaluation(obj, {"test": held_out}, None, 5)
    >>> full, fixed = evaluation(10, torch.zeros(3, 2))
    >>> full.tolist(), fixed["test"].tolist()
    ([nan, nan, nan], [9.0, 9.0, 9.0])
    """

    def __init__(
        self,
        obj: Objective,
        fixed_sets: Mapping[str, Any],
        loss_every: int | None,
        fixed_every: int,
    ) -> None:
        if not isinstance(fixed_sets, Mapping) or not all(
            isinstance(name, str) and name.isidentifier() for name in fixed_sets
        ):
            raise checks.invalid(
                "fixed_sets",
                "data by name, as {'test': (inputs, targets)}",
                checks.shown(fixed_sets),
            )
        self.fixed = {}
        for name, data in fixed_sets.items():
            try:
                self.fixed[name] = obj.with_data(data)
            except ValueError as error:
                raise ValueError(f"fixed_sets[{checks.shown(name)}]: {error}") from error
        self._obj, self._loss_every, self._fixed_every = obj, loss_every, fixed_every

    def __call__(self, step: int, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses at points [R, P], over all examples and over each fixed set; NaN if not due."""
        full = self._loss_every is not None and step % self._loss_every == 0
        due = step % self._fixed_every == 0
        return (
            _losses(self._obj, points, full),
            {name: _losses(obj, points, due) for name, obj in self.fixed.items()},
        )


def _losses(obj: Objective, points: Tensor, due: bool) -> Tensor:
    if not due:
        return torch.full(points.shape[:1], torch.nan, dtype=torch.float64)
    return obj.mean_losses(points)
