"""Projected SGD by backend and number of replicas, and the Langevin toys."""

import math

import pytest
import torch

from entropic_fast.dynamics import (
    Execution,
    LangevinIntegrator,
    ProjectedSGD,
    RidgePotential,
    RingPotential,
    relax,
    simulate_langevin,
)
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.models import build, initialize

STEPS, BATCH, PIVOTS = 30, 16, 9
PARTICLES, LANGEVIN_STEPS = 20_000, 50


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("replicas", [1, 4, 16, 32])
@pytest.mark.parametrize("model", ["digits-cnn", "digits-cnn-bn"])
def test_two_cycles_of_projected_sgd(benchmark, provenance, model, replicas, backend):
    """Divide by replicas x 30 for the time of a replica's update."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(512, 1, 8, 8, generator=g), torch.randint(10, (512,), generator=g)
    obj = Objective(initialize(build(model), seed=0), "cross_entropy", data)
    a = obj.parameters_vector()
    path = linear_path(a, a + 0.1 * torch.randn(len(a), generator=g), pivots=PIVOTS)
    benchmark.extra_info.update(provenance, replicas=replicas, updates=STEPS)
    run = benchmark(
        relax,
        obj,
        path,
        0.5,
        ProjectedSGD(0.01, BATCH, steps=STEPS),
        replicas=replicas,
        execution=Execution(backend=backend),
    )
    assert run.backend == backend


@pytest.mark.parametrize("scheme", ["euler-maruyama", "leimkuhler-matthews"])
@pytest.mark.parametrize("potential", [RingPotential(), RidgePotential()], ids=["ring", "ridge"])
def test_langevin_steps(benchmark, provenance, potential, scheme):
    angle = torch.arange(PARTICLES, dtype=torch.float64) * (2 * math.pi / PARTICLES)
    start = RingPotential().on_ring(angle)
    benchmark.extra_info.update(provenance, particles=PARTICLES, steps=LANGEVIN_STEPS)
    integrator = LangevinIntegrator(0.1, 0.002, scheme)
    benchmark(simulate_langevin, potential, start, integrator, LANGEVIN_STEPS)
