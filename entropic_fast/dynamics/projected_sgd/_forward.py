"""Projected SGD with a projection at every update, by directional derivatives alone.

A replica that is on the path before each update only has to know where the update's step leads
along the path. Let e_1 ... e_{M-1} be the path's segments, and Q an orthonormal basis of their
span [P, D] (D = 1 for a straight line, at most M - 1). The nearest point of the polyline to theta
depends on Q^T theta alone: what is perpendicular to all segments adds the same to the squared
distance from each. And the steps of SGD, with weight decay, momentum or Nesterov's momentum, are
linear in gradients and parameters, so that Q^T of them is the same optimizer run on Q^T theta with
the gradient Q^T grad L, momentum included. So the positions of k = 1 are exactly those of a run in
D dimensions, at the price of D directional derivatives an update and no backward pass.

Adam divides by root mean squares coordinate by coordinate, which Q^T does not go through: it is
left to the ordinary way. So are k > 1, where steps across the path change the next gradients. The
component of a step across the path is never computed: distances from the path are not known.

A directional derivative is two forward passes by count, where a gradient is three; on a CPU it
takes a third more time all the same (ResNet-8, D = 1, in benchmarks/results). What is gained is
memory: no activations wait for a backward pass.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from ..._torch.forward_mode import jvp
from ..._utils import checks
from ...objective import Objective
from ...paths._path import Path

# Segments' components outside of the span of others below so much of the longest are rounding.
_RANK = 1e-6


class Reduced:
    """A path in the D coordinates of its segments' span, and gradients in them.

    Args:
        obj: the objective.
        path: in its parameters.

    Attributes:
        path: the same polyline in D dimensions, float64.

    >>> from entropic_fast.paths import linear_path
    >>> obj = Objective(torch.nn.Linear(2, 1), "mse", (torch.ones(4, 2), torch.ones(4, 1)))
    >>> reduced = Reduced(obj, linear_path(torch.zeros(3), torch.tensor([0.0, 3.0, 4.0]), 5))
    >>> tuple(reduced.path.pivots.shape), reduced.lift(reduced.path.pivots[-1:]).tolist()
    ((5, 1), [[0.0, 3.0, 4.0]])
    """

    def __init__(self, obj: Objective, path: Path) -> None:
        self._obj = obj
        pivots = path.pivots.double()
        steps = (pivots[1:] - pivots[:-1]).T  # [P, M - 1]
        left, sizes, _ = torch.linalg.svd(steps, full_matrices=False)
        self._basis = left[:, sizes > _RANK * sizes[0]].contiguous()  # Q [P, D]
        coordinates = pivots @ self._basis
        self._offset = pivots[0] - self._basis @ coordinates[0]  # across the path
        self._directions = self._basis.T.to(path.pivots.dtype).contiguous()  # [D, P]
        self.path = Path(coordinates)
        _load_forward_mode()

    def lift(self, rows: Tensor) -> Tensor:
        """Points on the path from their coordinates.  # [R, D] -> [R, P]"""
        points: Tensor = (self._offset + rows @ self._basis.T).to(self._directions.dtype)
        return points

    def gradients(self, rows: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [R], and their derivatives in the coordinates [R, D]."""
        losses, slopes = torch.empty_like(rows[:, 0]), torch.empty_like(rows)
        with torch.no_grad():
            for r, theta in enumerate(self.lift(rows)):

                def loss(at: Tensor, r: int = r) -> Tensor:
                    return self._obj.minibatch_loss(at, inputs[r], targets[r])

                for d, direction in enumerate(self._directions):
                    value: tuple[Any, ...] = jvp(loss, (theta,), (direction,))
                    losses[r], slopes[r, d] = value
        return losses, slopes


def require(optimizer: str, project_every: int) -> None:
    """Refuse settings for which the shortcut is not exact."""
    if optimizer == "adam":
        raise checks.invalid(
            "engine",
            'optimizer "sgd" or "nesterov" with "forward"',
            '"adam", which divides coordinate by coordinate',
            'pass engine="auto"',
        )
    if project_every != 1:
        raise checks.invalid(
            "engine",
            'project_every=1 with "forward"',
            f"project_every={project_every}",
            'pass engine="auto"',
        )


def _load_forward_mode() -> None:
    with warnings.catch_warnings():  # torch's own, at the first use of forward mode
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
