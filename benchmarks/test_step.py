"""Fused projection step against torch.optim.SGD and a plain PyTorch projection.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_step.py
At full size (WRN-16-4's parameters), stored:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_step.py --benchmark-json=FILE

All rivals take turns within one round, so a change in the machine's load meets all of them alike:
pytest-benchmark times ours, and `extra_info["seconds"]` holds the medians of every rival.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.step import project_step, segment_squares, sgd_step

FULL = os.environ.get("ENTROPIC_FAST_BENCH") == "full"
SIZE = 2_748_890 if FULL else 10_001
PIVOTS = 20 if FULL else 5
ROUNDS = 30 if FULL else 5
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]


class Problem:
    """One replica near a path, its gradient, and every way to take a projected step."""

    def __init__(self, device: str, replicas: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pivots = torch.randn(PIVOTS, SIZE, generator=generator).cumsum(0).to(device)
        noise = torch.randn(replicas, SIZE, generator=generator).to(device)
        self.start = self.pivots[PIVOTS // 2] + 0.1 * noise
        self.grad = torch.randn(replicas, SIZE, generator=generator).to(device)
        self.squares = segment_squares(self.pivots)
        self.theta = self.start.clone()
        self.buffer = torch.zeros_like(self.theta)
        self.gram = self.pivots @ self.pivots.T
        self.none = self.pivots[:0]
        self.lr = torch.full((replicas,), 1e-3, dtype=torch.float64, device=device)

    def ours(self) -> None:
        sgd_step(self.theta, self.grad, self.buffer, lr=self.lr, pivots=self.none, **OPTIONS)

    def ours_projected(self) -> None:
        products = sgd_step(
            self.theta, self.grad, self.buffer, lr=self.lr, pivots=self.pivots, **OPTIONS
        )
        project_step(self.theta, products, self.pivots, self.squares)

    def torch_optim(self, project: bool, **how: bool) -> Callable[[], None]:
        parameter = self.start.clone().requires_grad_()
        parameter.grad = self.grad.clone()
        optimizer = torch.optim.SGD([parameter], lr=1e-3, **OPTIONS, **how)

        def step() -> None:
            optimizer.step()
            if project:
                self.plain_projection(parameter.detach())

        return step

    def plain_projection(self, theta: Tensor) -> None:
        """The fastest way without a kernel, one matrix product with the pivots and their Gram
        matrix made beforehand; it works in theta's own precision, where |theta|^2 cancels.
        """
        dots = theta @ self.pivots.T  # [R, M]
        gram, squares = self.gram, self.squares.to(theta.dtype)
        norms = gram.diagonal()
        along = dots.diff(dim=1) - (gram.diagonal(1) - norms[:-1])
        t = (along / squares).clamp(0, 1)
        apart = norms[:-1] - 2 * dots[:, :-1] + t * (t * squares - 2 * along)
        nearest = apart.argmin(1)
        start, end = self.pivots[nearest], self.pivots[nearest + 1]
        theta.copy_(torch.lerp(start, end, t.gather(1, nearest[:, None])))


def interleave(
    benchmark: Any, rivals: dict[str, Callable[[], None]], device: str, facts: dict[str, Any]
) -> None:
    """Times the first entry with pytest-benchmark and the others in its rounds."""
    ours, *others = rivals
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def timed(name: str) -> None:
        begin = time.perf_counter()
        rivals[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - begin)

    def others_first() -> None:
        for name in others:
            timed(name)

    benchmark.pedantic(timed, args=(ours,), setup=others_first, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info.update(
        facts,
        parameters=SIZE,
        pivots=PIVOTS,
        device=device,
        backend=backend.backend_for("step", device),
        seconds={name: median(values[2:]) for name, values in seconds.items()},
    )


@pytest.mark.parametrize("device", DEVICES)
def test_update_alone(benchmark: Any, device: str, provenance: dict[str, Any]) -> None:
    problem = Problem(device)
    rivals = {
        "ours": problem.ours,
        "torch foreach": problem.torch_optim(False, foreach=True),
        "torch fused": problem.torch_optim(False, fused=True),
    }
    interleave(benchmark, rivals, device, provenance)


@pytest.mark.parametrize("device", DEVICES)
def test_update_and_projection(benchmark: Any, device: str, provenance: dict[str, Any]) -> None:
    problem = Problem(device)
    rivals = {
        "ours": problem.ours_projected,
        "torch foreach, plain projection": problem.torch_optim(True, foreach=True),
        "torch fused, plain projection": problem.torch_optim(True, fused=True),
    }
    interleave(benchmark, rivals, device, provenance)
