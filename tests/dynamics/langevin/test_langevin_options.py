"""What simulate_langevin may be asked for, and that kernels and PyTorch give the same."""

import gc
import math

import pytest
import torch
from langevin_cases import simulate_with

from entropic_fast.dynamics import (
    ChannelPotential,
    LangevinIntegrator,
    LangevinRecording,
    RidgePotential,
    RingPotential,
    simulate_langevin,
)
from entropic_fast.dynamics.langevin import _simulate as langevin
from entropic_fast.ops.backend import BackendError
from entropic_fast.ops.random_bits.streams import fold_in, normal

SCHEMES = ("euler-maruyama", "leimkuhler-matthews", "baoab")
BUILT_IN = [RingPotential(modes=2), RidgePotential(fast=2), ChannelPotential()]


class Mine(RingPotential):
    """Another ring, whose force pushes outwards."""

    def force(self, x):
        return x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("potential", BUILT_IN, ids=["ring", "ridge", "channel"])
def test_kernels_autograd_and_calls_of_any_length_agree(potential, scheme, monkeypatch):
    g = torch.Generator().manual_seed(3)
    start = 0.6 + 0.3 * torch.rand(9, potential.dim, generator=g, dtype=torch.float64)
    settings = dict(temperature=0.3, dt=0.002, steps=25, record_every=10, scheme=scheme, friction=2)
    whole = simulate_with(potential, start, **settings)
    plain = simulate_with(lambda x: potential(x), start, **settings)
    reference = simulate_with(potential, start, backend="reference", **settings)
    assert (whole.backend, plain.backend, reference.backend) == ("cpp", "reference", "reference")
    monkeypatch.setattr(langevin, "CALL", 30)  # three steps of nine particles
    parts = simulate_with(potential, start, **settings)
    assert torch.equal(parts.positions, whole.positions)
    for other in (plain, reference):
        torch.testing.assert_close(other.positions, whole.positions, rtol=1e-10, atol=1e-10)
        if scheme == "baoab":
            torch.testing.assert_close(other.velocities, whole.velocities, rtol=1e-9, atol=1e-9)
    assert (whole.velocities is not None) == (scheme == "baoab")


def test_a_subclass_or_a_changed_force_is_not_taken_for_the_built_in():
    start = torch.ones(2, 2, dtype=torch.float64)
    run = simulate_langevin(Mine(), start, LangevinIntegrator(0.0, 0.1), 1)
    torch.testing.assert_close(run.final, 1.1 * start)
    changed = RingPotential()
    changed.force = lambda x: -x
    run = simulate_langevin(changed, start, LangevinIntegrator(0.0, 0.1), 1)
    assert run.backend == "reference"
    torch.testing.assert_close(run.final, 0.9 * start)
    with pytest.raises(BackendError, match="'cpp' was asked for but runs built-in potentials only"):
        simulate_langevin(Mine(), start, LangevinIntegrator(0.0, 0.1), 1, backend="cpp")


def test_an_observer_sees_what_would_have_been_recorded():
    ring = RingPotential()
    start = ring.on_ring(torch.linspace(0, 6, 50, dtype=torch.float64))
    settings = dict(temperature=0.2, dt=0.01, steps=35, record_every=10)
    kept = simulate_with(ring, start, **settings)
    seen = simulate_with(ring, start, observe=lambda x: x.zero_() + x, **settings)
    assert seen.positions.shape == (1, 50, 2) and torch.equal(seen.final, kept.final)
    seen = simulate_with(ring, start, observe=lambda x: x.mean(0), **settings)
    assert torch.equal(seen.observed, kept.positions.mean(1)) and kept.observed is None
    kept = simulate_with(ring, start, scheme="baoab", **settings)
    seen = simulate_with(
        ring, start, scheme="baoab", observe=lambda x, v: (v * v).mean(), **settings
    )
    assert torch.equal(seen.observed, kept.velocities.square().mean((1, 2)))
    assert torch.equal(seen.velocities[-1], kept.velocities[-1])
    with pytest.raises(ValueError, match="observe: expected a function to a tensor"):
        simulate_with(ring, start, observe=lambda x: float(x.sum()), **settings)


@pytest.mark.parametrize("fused", [True, False])
def test_memory_does_not_grow_with_the_steps(fused):
    ring, size = RingPotential(), 8 * 2 * 1000
    start = ring.on_ring(torch.linspace(0, 6, 1000, dtype=torch.float64))
    held = []

    def bytes_of_tensors(x):
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        held.append(sum(t.numel() * t.element_size() for t in found))
        return x[0, 0]

    potential = ring if fused else lambda x: ring(x)
    simulate_langevin(
        potential,
        start,
        LangevinIntegrator(0.1, 0.01),
        60,
        recording=LangevinRecording(every=10, observe=bytes_of_tensors),
    )
    assert len(held) == 7 and held[-1] - held[1] < size


def test_velocities_start_as_given_or_as_maxwell_s():
    start = torch.ones(4, 2, dtype=torch.float64)
    settings = dict(temperature=0.3, dt=0.01, steps=1, seed=3, scheme="baoab")
    run = simulate_with(RingPotential(), start, **settings)
    expected = normal((4, 2), fold_in(3, "langevin", "velocities")) * math.sqrt(0.3)
    assert torch.equal(run.velocities[0], expected)
    given = torch.arange(8.0).reshape(4, 2)
    run = simulate_with(RingPotential(), start, start_velocities=given, **settings)
    assert torch.equal(run.velocities[0], given.double())


def test_friction_is_a_change_of_the_time_step_without_inertia():
    start = torch.full((5, 2), 0.8, dtype=torch.float64)
    one = simulate_langevin(RingPotential(), start, LangevinIntegrator(0.3, 0.01), 20)
    three = simulate_langevin(
        RingPotential(), start, LangevinIntegrator(0.3, 0.03, friction=3.0), 20
    )
    torch.testing.assert_close(one.final, three.final, rtol=1e-12, atol=1e-12)


def test_a_divergence_names_the_particle_by_its_number():
    start = torch.ones(5, 2, dtype=torch.float64)
    start[3] = 40.0  # the channel's floor is at x = 0: the others stay near it
    start[[0, 1, 2, 4], 0] = 0.0
    for potential in (ChannelPotential(), lambda x: ChannelPotential()(x)):
        with pytest.raises(ValueError, match="particle 103 not finite by step"):
            simulate_langevin(
                potential, start, LangevinIntegrator(0.0, 1.0), 900, first_particle=100
            )
