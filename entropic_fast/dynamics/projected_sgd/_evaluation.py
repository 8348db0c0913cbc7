"""Losses over all examples and over other data sets, at the steps where they are due."""

from __future__ import annotations

import torch
from torch import Tensor

from ...objective import Objective
from ._settings import Recording


class Evaluation:
    """Losses at points [R, P] over all examples and over each data set; NaN where not due."""

    def __init__(self, obj: Objective, recording: Recording) -> None:
        self.datasets = {}
        for name, data in recording.datasets.items():
            try:
                self.datasets[name] = obj.with_data(data)
            except ValueError as error:
                raise ValueError(f"recording.datasets[{name!r}]: {error}") from error
        assert recording.datasets_every is not None
        self._obj, self._loss_every = obj, recording.loss_every
        self._datasets_every = recording.datasets_every

    def __call__(self, step: int, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        full = self._loss_every is not None and step % self._loss_every == 0
        due = step % self._datasets_every == 0
        return (
            _losses(self._obj, points, full),
            {name: _losses(obj, points, due) for name, obj in self.datasets.items()},
        )


def _losses(obj: Objective, points: Tensor, due: bool) -> Tensor:
    if not due:
        return torch.full(points.shape[:1], torch.nan, dtype=torch.float64)
    return obj.mean_losses(points)
