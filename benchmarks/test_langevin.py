"""Langevin steps in fused kernels against vectorised loops in PyTorch and NumPy.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_langevin.py
A million particles, stored:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_langevin.py --benchmark-json=FILE

All rivals take turns within one round, so a change in the machine's load meets all of them alike:
pytest-benchmark times ours, and `extra_info["ns_per_particle_step"]` holds the medians of every
rival. They take different numbers of steps, as the loops are slow; a step's cost does not depend on
how many there are. The loops draw their noise with the library's own generator, in sequence, and
compute Euler-Maruyama; ours and the reference draw the same counter-based noise.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from entropic_fast.ops import backend
from entropic_fast.ops.langevin import FAMILY, advance
from entropic_fast.reference.langevin import UNDERDAMPED
from entropic_fast.reference.langevin_forces import force_of

FULL = os.environ.get("ENTROPIC_FAST_BENCH") == "full"
PARTICLES = 1_000_000 if FULL else 2_000
STEPS = 200 if FULL else 20
LOOP_STEPS = 5
ROUNDS = 15 if FULL else 3
TEMPERATURE, DT = 0.1, 0.002
POTENTIALS: dict[str, tuple[float, ...]] = {
    "ring": (20.0, 0.8, 1),
    "ridge": (100.0, -1.0, 7.0, 100.0),
    "channel": (50.0, 1.0, 1.0),
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]


class Problem:
    """Particles near the ring (or on a channel's floor), and every way to move them."""

    def __init__(self, potential: str, scheme: str, dtype: torch.dtype, device: str) -> None:
        self.potential, self.scheme = potential, scheme
        angle = torch.arange(PARTICLES, dtype=torch.float64) * (2 * math.pi / PARTICLES)
        start = torch.stack((torch.cos(angle), torch.sin(angle)), 1)
        if potential != "ring":
            start = torch.stack((torch.zeros_like(angle), angle), 1)
        self.x = start.to(device, dtype)
        self.v = torch.zeros_like(self.x) if scheme in UNDERDAMPED else None

    def kernel(self, steps: int, backend_name: str | None) -> Callable[[], None]:
        def run() -> None:
            advance(
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scheme", ["leimkuhler-matthews", "baoab"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_steps(
    benchmark: Any,
    potential: str,
    scheme: str,
    dtype: torch.dtype,
    device: str,
    provenance: dict[str, Any],
) -> None:
    problem = Problem(potential, scheme, dtype, device)
    rivals: dict[str, tuple[int, Callable[[], None]]] = {
        "ours": (STEPS, problem.kernel(STEPS, None)),
        "reference": (LOOP_STEPS, problem.kernel(LOOP_STEPS, "reference")),
    }
    if scheme not in UNDERDAMPED:
        rivals["torch loop"] = (LOOP_STEPS, problem.torch_loop)
        if potential == "ring" and device == "cpu":
            rivals["numpy loop"] = (LOOP_STEPS, problem.numpy_loop)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def timed(name: str) -> None:
        steps, run = rivals[name]
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append((time.perf_counter() - begin) / steps)

    def others_first() -> None:
        for name in list(rivals)[1:]:
            timed(name)

    benchmark.pedantic(timed, args=("ours",), setup=others_first, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        provenance,
        particles=PARTICLES,
        steps=STEPS,
        device=device,
        dtype=str(dtype),
        backend=backend.backend_for(FAMILY, device),
        ns_per_particle_step={
            name: 1e9 * median(values[1:]) / PARTICLES for name, values in seconds.items()
        },
    )
