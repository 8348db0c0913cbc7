"""Tasks of figure 1: Langevin particles in the ring and ridge potentials."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ...._utils.table import Table
from ....dynamics import (
    LangevinIntegrator,
    LangevinRecording,
    RidgePotential,
    RingPotential,
    simulate_langevin,
)
from ....ops.random_bits.streams import fold_in, uniform
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from ..._sections import Count, Positive, Section

BINS = 24  # of the angle
RING = RingPotential(stiffness=20.0, contrast=0.8)
# d ln g / dy = -1; long enough that the walls are not felt at first.
RIDGE = RidgePotential(stiff=100.0, broad=100.0 * math.exp(-7.0), length=7.0)
RIDGE_START = 2.5


class Langevin(Section):
    """Langevin particles in the ring and ridge potentials of figure 1."""

    toml = "langevin"
    particles: Annotated[int, Field(ge=2)] = 100_000
    temperature: Positive = 0.25
    ridge_temperature: Positive = 0.075
    dt: Positive = 0.006
    steps: Count = 5000


def tasks(run: RunFolder) -> list[Task]:
    """The ring without and with noise, and the ridge."""
    section = run.config[Langevin]
    # A particle's step takes nanoseconds, a gradient of one example tens of microseconds.
    cost = section.particles * section.steps / 5000
    return [
        Task("langevin/ring-cold", ring, (0.0,), cost=cost),
        Task("langevin/ring-hot", ring, (section.temperature,), cost=cost),
        Task("langevin/ridge", ridge, cost=cost),
    ]


def ring(run: RunFolder, progress: Progress, temperature: float) -> dict[str, Any]:
    """Angular histogram of independent particles, started uniformly in angle near r = 1."""
    section = run.config[Langevin]
    seed = fold_in(run.config.seed, "toy", "ring", str(temperature))
    draw = uniform((section.particles, 2), seed)
    # Start off the ring, so that particles relax at T = 0 too; but close to it, because the way
    # back turns a particle in second order, which a million of them resolve.
    start = RING.on_ring(2 * math.pi * draw[:, 0], 0.9 + 0.2 * draw[:, 1])
    integrator = LangevinIntegrator(temperature, section.dt)
    final = simulate_langevin(RING, start, integrator, section.steps, seed=seed).final
    progress(1.0)
    angle = torch.atan2(final[:, 1], final[:, 0]).numpy()
    edges = np.linspace(-math.pi, math.pi, BINS + 1)
    count = np.histogram(angle, edges)[0]
    middle = (edges[:-1] + edges[1:]) / 2
    fine = torch.from_numpy(np.linspace(edges[:-1], edges[1:], 33))  # [33, BINS]
    share = np.trapezoid(RING.analytic_density(temperature, fine).numpy(), fine.numpy(), axis=0)
    width = edges[1] - edges[0]
    return {
        "density": Table(
            {
                "temperature": [temperature] * BINS,
                "angle": middle,
                "stiffness": RING.stiffness(torch.from_numpy(middle)).numpy(),
                "count": count,
                "expected": share * section.particles,
                "density": count / section.particles / width,
                "std_error": np.sqrt(np.maximum(count, 1)) / section.particles / width,
                "analytic": share / width,
            }
        ),
        "sample": {"positions": final[:400].contiguous()},
    }


def ridge(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Particles released on the stiff side of the ridge: their mean, and a typical one's track."""
    section = run.config[Langevin]
    seed = fold_in(run.config.seed, "toy", "ridge")
    start = torch.zeros(section.particles, 2, dtype=torch.float64)
    start[:, 1] = RIDGE_START
    integrator = LangevinIntegrator(section.ridge_temperature, section.dt)
    every = max(1, section.steps // 100)

    def moments(positions: Tensor) -> Tensor:
        y = positions[:, 1]
        return torch.stack((y.mean(), y.std() / math.sqrt(len(y))))

    # The positions of a million particles at all records would be gigabytes.
    recording = LangevinRecording(every, moments)
    result = simulate_langevin(
        RIDGE, start, integrator, section.steps, seed=seed, recording=recording
    )
    progress(1.0)
    assert result.observed is not None
    times, (means, errors) = result.times.tolist(), result.observed.T
    # The figure shows the particle that ends nearest to the mean, simulated again alone.
    track = simulate_langevin(
        RIDGE,
        start[:1],
        integrator,
        section.steps,
        seed=seed,
        recording=LangevinRecording(every),
        first_particle=int((result.final[:, 1] - means[-1]).abs().argmin()),
    )
    x, slow = track.positions[:, 0].T.tolist()
    force = [RIDGE.effective_force(section.ridge_temperature)] * len(times)
    mean = {"time": times, "mean": means.numpy(), "std_error": errors.numpy(), "force": force}
    return {"mean": Table(mean), "track": Table({"time": times, "x": x, "y": slow})}


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    rings = [run.table(f"langevin/ring-{name}", "density") for name in ("cold", "hot")]
    return {
        "fig1_ring": Table.concatenated(rings),
        "fig1_ridge": run.table("langevin/ridge", "mean"),
        "fig1_track": run.table("langevin/ridge", "track"),
    }
