"""Langevin steps in fused kernels against vectorized loops in PyTorch and NumPy.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_langevin.py
A million particles, stored in benchmarks/results/langevin-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_langevin.py

Rivals take different numbers of steps, as the loops are slow; a step's cost does not depend on how
many there are. The loops draw their noise with the library's own generator, in sequence, and
compute Euler-Maruyama; ours and the reference draw the same counter-based noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import DEVICE, FULL, store, table, take_turns

from entropic_fast.ops import backend
from entropic_fast.ops.langevin import FAMILY, langevin_steps
from entropic_fast.ops.langevin.forces import force_of
from entropic_fast.ops.langevin.reference import UNDERDAMPED

PARTICLES = 1_000_000 if FULL else 2_000
STEPS = 200 if FULL else 20
LOOP_STEPS = 5
ROUNDS = 7 if FULL else 2
TEMPERATURE, DT = 0.1, 0.002
POTENTIALS: dict[str, tuple[float, ...]] = {
    "ring": (20.0, 0.8, 1),
    "ridge": (100.0, -1.0, 7.0, 100.0),
    "channel": (50.0, 1.0, 1.0),
}


class Problem:
    """Particles near the ring (or on a channel's floor), and every way to move them."""

    def __init__(self, potential: str, scheme: str, dtype: torch.dtype) -> None:
        self.potential, self.scheme = potential, scheme
        angle = torch.arange(PARTICLES, dtype=torch.float64) * (2 * math.pi / PARTICLES)
        start = torch.stack((torch.cos(angle), torch.sin(angle)), 1)
        if potential != "ring":
            start = torch.stack((torch.zeros_like(angle), angle), 1)
        self.x = start.to(DEVICE, dtype)
        self.v = torch.zeros_like(self.x) if scheme in UNDERDAMPED else None

    def kernel(self, steps: int, backend_name: str | None) -> Callable[[], None]:
        def run() -> None:
            langevin_steps(
                self.x, self.v, potential=self.potential, parameters=POTENTIALS[self.potential],
                scheme=self.scheme, temperature=TEMPERATURE, dt=DT, steps=steps,
                backend=backend_name,
            )  # fmt: skip

        return run

    def torch_loop(self) -> None:
        """Euler-Maruyama as one writes it: closed-form force, torch.randn."""
        force = force_of(self.potential, POTENTIALS[self.potential])
        x, scale = self.x, math.sqrt(2 * TEMPERATURE * DT)
        for _ in range(LOOP_STEPS):
            x = x + DT * force(x) + scale * torch.randn_like(x)

    def numpy_loop(self) -> None:
        """The ring in NumPy: Philox as its bit generator's own ziggurat takes it."""
        k, contrast, _ = POTENTIALS["ring"]
        x = self.x.cpu().numpy()
        draw = np.random.Generator(np.random.Philox(0))
        scale = math.sqrt(2 * TEMPERATURE * DT)
        for _ in range(LOOP_STEPS):
            r = np.sqrt(x[:, 0] ** 2 + x[:, 1] ** 2)
            cos, sin = x[:, 0] / r, x[:, 1] / r
            u = r - 1
            radial = -k * (1 + contrast * cos) * u
            angular = 0.5 * k * contrast * sin * u * u / r
            force = np.stack((radial * cos - angular * sin, radial * sin + angular * cos), 1)
            x = x + DT * force + scale * draw.standard_normal(x.shape, dtype=x.dtype)


def measured(potential: str, scheme: str, dtype: torch.dtype) -> dict[str, Any]:
    """Nanoseconds a particle and step of every way, in turns."""
    problem = Problem(potential, scheme, dtype)
    rivals: dict[str, tuple[int, Callable[[], None]]] = {
        "ours": (STEPS, problem.kernel(STEPS, None)),
        "reference": (LOOP_STEPS, problem.kernel(LOOP_STEPS, "reference")),
    }
    if scheme not in UNDERDAMPED:
        rivals["torch loop"] = (LOOP_STEPS, problem.torch_loop)
        if potential == "ring" and DEVICE == "cpu":
            rivals["NumPy loop"] = (LOOP_STEPS, problem.numpy_loop)
    rounds = take_turns({name: run for name, (_, run) in rivals.items()}, ROUNDS)
    for name, (steps, _) in rivals.items():
        rounds.seconds[name] = [1e9 * s / steps / PARTICLES for s in rounds.seconds[name]]
    ways = table(rounds)
    return {
        "potential": potential,
        "scheme": scheme,
        "dtype": str(dtype).removeprefix("torch."),
        "ns a particle and step": ways["seconds"],
        "failed": ways["failed"],
    }


def test_langevin(provenance: dict[str, Any], tmp_path: Path) -> None:
    cells = product(POTENTIALS, ("leimkuhler-matthews", "baoab"), (torch.float64, torch.float32))
    record = {
        **provenance,
        "device": DEVICE,
        "backend": backend.backend_for(FAMILY, DEVICE),
        "particles": PARTICLES,
        "steps": STEPS,
        "runs": [measured(*cell) for cell in cells],
    }
    store("langevin", record, tmp_path)
    assert not any(run["failed"] for run in record["runs"])


def test_ten_thousand_steps(provenance: dict[str, Any], tmp_path: Path) -> None:
    """A million particles for ten thousand steps on the ring, between NumPy's own steps."""
    steps = 10_000 if FULL else 20
    problem = Problem("ring", "leimkuhler-matthews", torch.float64)
    rivals: dict[str, Callable[[], None]] = {"ours, all steps": problem.kernel(steps, None)}
    if DEVICE == "cpu":
        rivals["NumPy loop, a step"] = problem.numpy_loop
    rounds = take_turns(rivals, 3, warm_up=False)
    if DEVICE == "cpu":
        taken = rounds.seconds["NumPy loop, a step"]
        rounds.seconds["NumPy loop, a step"] = [s / LOOP_STEPS for s in taken]
    shown = {"device": DEVICE, "particles": PARTICLES, "steps": steps, **table(rounds)}
    store("ten-thousand-steps", {**provenance, **shown}, tmp_path)
    assert not rounds.failed
