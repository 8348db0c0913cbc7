"""Projected SGD's cycle against torch.optim.SGD and projection in plain PyTorch.

A cycle is 15 updates with momentum and weight decay, and one projection on a polyline of 9 pivots.
Small by default, so that it runs with the tests:
    pytest benchmarks/test_projected_step.py
At full size (WRN-16-4's parameters), stored in benchmarks/results/step-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_projected_step.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import DEVICE, FULL, store, table, take_turns
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.projected_step import pivot_squares, project_step, segment_squares, sgd_step

SIZE = 2_748_890 if FULL else 10_001
PIVOTS, CYCLE = 9, 15
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
# Arrays of P numbers read or written: by an update theta, gradient and momentum are read, theta
# and momentum written; products read two pivots more; moving theta reads it and two pivots.
UPDATE, PRODUCTS, MOVE = 5, 2, 4


class Problem:
    """A replica near a path, its gradient, and every way to take a projected step."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.pivots = randn(PIVOTS, SIZE).cumsum(0)
        self.start = (torch.lerp(self.pivots[4], self.pivots[5], 0.4) + 0.01 * randn(SIZE))[None]
        self.grad = 0.01 * randn(1, SIZE)
        self.squares, self.between = segment_squares(self.pivots), pivot_squares(self.pivots)
        self.theta, self.buffer = self.start.clone(), torch.zeros_like(self.start)
        self.lr = torch.full((1,), 1e-3, dtype=torch.float64, device=DEVICE)
        self.near = torch.tensor([4], device=DEVICE)
        self.norms = self.pivots.square().sum(1)
        self.neighbors = (self.pivots[:-1] * self.pivots[1:]).sum(1)

    def another(self) -> Problem:
        """A replica of its own, near the same path."""
        other = copy.copy(self)
        other.theta, other.buffer = self.start.clone(), torch.zeros_like(self.start)
        return other

    def update(self) -> None:
        sgd_step(self.theta, self.grad, self.buffer, lr=self.lr, **OPTIONS)

    def update_and_project(self) -> Tensor:
        products = sgd_step(
            self.theta,
            self.grad,
            self.buffer,
            lr=self.lr,
            pivots=self.pivots,
            near=self.near,
            **OPTIONS,
        )
        self.near, t, _ = project_step(
            self.theta, products, self.pivots, self.squares, self.near, self.between
        )
        return self.near + t

    def cycle(self) -> Tensor:
        for _ in range(CYCLE - 1):
            self.update()
        return self.update_and_project()

    def optimizer(self, **how: bool) -> tuple[Tensor, Callable[[], Any]]:
        parameter = self.start[0].clone().requires_grad_()
        parameter.grad = self.grad[0].clone()
        return parameter.detach(), torch.optim.SGD([parameter], lr=1e-3, **OPTIONS, **how).step

    def plain_projection(self, theta: Tensor) -> Tensor:
        """What one would write: all segments at once.

        Returns:
            where on the path theta is put: segment plus position on it.
        """
        start, along = self.pivots[:-1], self.pivots[1:] - self.pivots[:-1]
        t = (((theta - start) * along).sum(1) / along.square().sum(1)).clamp(0, 1)
        points = start + t[:, None] * along
        nearest = (points - theta).square().sum(1).argmin()
        theta.copy_(points[nearest])
        return nearest + t[nearest]

    def product_projection(self, theta: Tensor) -> Tensor:
        """The fastest way without a kernel: one matrix product with the pivots.

        Squared distances follow from it and from squared lengths; in float32 they cancel where
        theta is far larger than its distance from the path.
        """
        dots, norms = self.pivots @ theta, self.norms  # [M]
        steps = self.squares.to(theta.dtype)
        ahead = dots.diff() - (self.neighbors - norms[:-1])
        t = (ahead / steps).clamp(0, 1)
        apart = norms[:-1] - 2 * dots[:-1] + t * (t * steps - 2 * ahead)
        nearest = apart.argmin()
        start, end = self.pivots[nearest], self.pivots[nearest + 1]
        theta.copy_(torch.lerp(start, end, t[nearest]))
        return nearest + t[nearest]

    def torch_cycle(self, project: Callable[[Tensor], Tensor], **how: bool) -> Callable[[], Tensor]:
        theta, step = self.optimizer(**how)

        def cycle() -> Tensor:
            for _ in range(CYCLE):
                step()
            return project(theta)

        return cycle


def test_step(provenance: dict[str, Any], tmp_path: Path) -> None:
    problem = Problem()
    apart = problem.start[0].clone()  # projected again and again: it is on the path after once
    source, target = torch.zeros(4 * SIZE, device=DEVICE), torch.zeros(4 * SIZE, device=DEVICE)
    rivals: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "ours, update": problem.another().update,
        "torch foreach, update": problem.optimizer(foreach=True)[1],
        "torch fused, update": problem.optimizer(fused=True)[1],
        "ours, update and projection": problem.another().update_and_project,
        "plain projection": lambda: problem.plain_projection(apart),
        "projection by a matrix product": lambda: problem.product_projection(apart),
        "ours, cycle": problem.cycle,
    }
    for how in ("foreach", "fused"):
        for name in ("plain", "product"):
            project = getattr(problem, f"{name}_projection")
            rivals[f"torch {how}, {name} projection, cycle"] = problem.torch_cycle(
                project, **{how: True}
            )
    rounds = take_turns(rivals, 30 if FULL else 3)
    assert not rounds.failed
    # The gradient is the same in all updates, so all ways go the same way; but for the matrix
    # product, whose float32 cancels.
    places = {name: float(v) for name, v in rounds.values.items() if name.endswith("cycle")}
    exact = [place for name, place in places.items() if "product" not in name]
    assert max(exact) - min(exact) < 1e-4, places

    seconds = {name: rounds.median(name) for name in rivals}
    number, copied = 4 * SIZE, 2 * 4 * 4 * SIZE / seconds["copy"]
    bytes_of = {
        "ours, update": UPDATE * number,
        "ours, update and projection": (UPDATE + PRODUCTS + MOVE) * number,
        "ours, cycle": (CYCLE * UPDATE + PRODUCTS + MOVE) * number,
    }
    record = {
        **provenance,
        "device": DEVICE,
        "backend": backend.backend_for("projected_step", DEVICE),
        "parameters": SIZE,
        "pivots": PIVOTS,
        "updates in a cycle": CYCLE,
        "copy bytes per second": copied,
        "share of the copy's bandwidth": {
            name: moved / seconds[name] / copied for name, moved in bytes_of.items()
        },
        "where the replica ends": places,
        **table(rounds),
    }
    store("step", record, tmp_path)
