"""Stationary densities of the kernels: chi-square tests, each with a check of its power.

Every particle gives one sample, at the end: samples are independent.
"""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from entropic_fast.dynamics import (
    ChannelPotential,
    LangevinIntegrator,
    RidgePotential,
    RingPotential,
    simulate_langevin,
)

LEVEL = 1e-4  # of every chi-square test here: chance of rejecting a correct density
N = 60_000
SCHEMES = ("leimkuhler-matthews", "baoab")


def p_value(samples, cdf, edges):
    """Of counts between edges, against a distribution function; the ends are open."""
    inner = np.asarray(edges, dtype=float)
    counts = np.bincount(np.digitize(samples.double().numpy(), inner), minlength=len(inner) + 1)
    share = np.diff(np.concatenate(([0.0], np.asarray(cdf(inner)), [1.0])))
    assert (share * len(samples)).min() > 5
    return stats.chisquare(counts, share * len(samples)).pvalue


def cdf_of(density, low, high):
    """Distribution function of a density on [low, high], at given points."""
    grid = torch.linspace(low, high, 20001, dtype=torch.float64)
    total = integrate.cumulative_trapezoid(density(grid).numpy(), grid.numpy(), initial=0)
    return lambda at: np.interp(at, grid.numpy(), total / total[-1])


def energy_quantiles():
    return -np.log(1 - np.linspace(0, 1, 41)[1:-1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("temperature", [0.05, 0.4])
@pytest.mark.parametrize("fast", [1, 2])
def test_along_a_channel_the_density_is_von_mises_at_every_temperature(fast, temperature, scheme):
    channel = ChannelPotential(8.0, 1.4 / fast, length=2.0, fast=fast)
    # The slowest mode along it decays at the rate T (2 pi / length)^2 or somewhat less.
    time = 20 / (temperature * math.pi**2) if scheme == SCHEMES[0] else 40 + 3 / temperature
    dt = 0.006 if scheme == SCHEMES[0] else 0.04
    start = torch.zeros(N, fast + 1, dtype=torch.float64)
    run = simulate_langevin(
        channel,
        start,
        LangevinIntegrator(temperature, dt, scheme=scheme),
        round(time / dt),
        seed=fast,
    )
    along = torch.remainder(run.final[:, -1], 2.0)
    edges = np.linspace(0, 2, 33)[1:-1]
    exact = cdf_of(lambda y: channel.analytic_density(temperature, y), 0, 2)
    assert p_value(along, exact, edges) > LEVEL
    # Power: an entropic force 10 % off is rejected, and so is none.
    for wrong in (0.9, 1.1, 0.0):
        other = cdf_of(lambda y, w=wrong: channel.analytic_density(temperature, y) ** w, 0, 2)
        assert p_value(along, other, edges) < LEVEL


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "potential",
    [ChannelPotential(8.0, 0.7, length=2.0, fast=2), RidgePotential(12.0, 6.0, fast=2, wall=9.0)],
    ids=["channel", "ridge"],
)
def test_across_the_energy_is_boltzmann_s(potential, scheme):
    """1/2 g |x|^2 / T of two fast directions is exponential of mean 1, wherever y is."""
    temperature, dt = 0.3, 0.008
    start = torch.zeros(N, 3, dtype=torch.float64)
    run = simulate_langevin(
        potential, start, LangevinIntegrator(temperature, dt, scheme=scheme), 2500, seed=4
    )
    x, y = run.final[:, :-1], run.final[:, -1]
    energy = 0.5 * potential.stiffness(y) * x.square().sum(1)

    def exact(t):
        return lambda e: 1 - np.exp(-e / t)

    quantiles = energy_quantiles() * temperature
    assert p_value(energy, exact(temperature), quantiles) > LEVEL
    for wrong in (0.9, 1.1):  # power: a temperature 10 % off is rejected
        assert p_value(energy, exact(wrong * temperature), quantiles) < LEVEL
    if run.velocities is not None:
        v = run.velocities[-1].flatten()
        edges = stats.norm.ppf(np.linspace(0, 1, 41)[1:-1]) * math.sqrt(temperature)
        assert p_value(v, lambda e: special.ndtr(e / math.sqrt(temperature)), edges) > LEVEL
        wide = math.sqrt(1.1 * temperature)
        assert p_value(v, lambda e: special.ndtr(e / wide), edges) < LEVEL


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ring_s_angle_and_radius_are_boltzmann_s(scheme, dtype):
    ring, temperature = RingPotential(10.0, 0.8, modes=2), 0.25
    g = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(N, generator=g, dtype=torch.float64)
    dt = 0.006 if scheme == SCHEMES[0] else 0.02
    run = simulate_langevin(
        ring,
        ring.on_ring(angle).to(dtype),
        LangevinIntegrator(temperature, dt, scheme=scheme),
        2500,
        seed=2,
    )
    x = run.final.double()
    at, r = torch.atan2(x[:, 1], x[:, 0]), x.norm(dim=1)
    edges = np.linspace(-math.pi, math.pi, 33)[1:-1]
    exact = cdf_of(lambda a: ring.analytic_density(temperature, a), -math.pi, math.pi)
    assert p_value(at, exact, edges) > LEVEL
    uniform = cdf_of(torch.ones_like, -math.pi, math.pi)
    assert p_value(at, uniform, edges) < LEVEL

    def radial(t):
        turn = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)[:-1]
        stiffness = ring.stiffness(turn)[:, None]
        return cdf_of(lambda s: (s * torch.exp(-0.5 * stiffness * (s - 1) ** 2 / t)).sum(0), 0, 4)

    edges = np.linspace(0.4, 1.8, 31)
    assert p_value(r, radial(temperature), edges) > LEVEL
    for wrong in (0.9, 1.1):  # power: a temperature 10 % off is rejected
        assert p_value(r, radial(wrong * temperature), edges) < LEVEL


@pytest.mark.parametrize("fast", [1, 2, 3])
def test_the_channel_s_closed_forms(fast):
    channel = ChannelPotential(20.0, 1.3, length=1.7, fast=fast)
    y = torch.linspace(0, 1.7, 4001, dtype=torch.float64).requires_grad_()
    density = channel.analytic_density(0.2, y.detach())
    assert float(torch.trapezoid(density, y.detach())) == pytest.approx(1, rel=1e-7)
    energy = channel.effective_potential(0.2, y)
    ratio = density * torch.exp(energy.detach() / 0.2)
    torch.testing.assert_close(ratio, ratio[:1].expand(4001))
    slope = torch.autograd.grad(energy.sum(), y)[0]
    torch.testing.assert_close(channel.effective_force(0.2, y.detach()), -slope)
    assert torch.equal(channel.analytic_density(5.0, y.detach()), density)
    x = torch.randn(30, fast + 1, dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(channel(x).sum(), x)[0]
    torch.testing.assert_close(channel.force(x.detach()), -gradient, rtol=1e-10, atol=1e-10)


def test_the_mean_force_along_a_channel_is_the_effective_one():
    """Held by nothing but its curvature: -dV/dy averaged over x is -dV_eff/dy at each y."""
    channel, temperature = ChannelPotential(300.0, 0.5, length=3.0), 0.3
    g = torch.Generator().manual_seed(1)
    for y in (0.3, 0.75, 2.0):
        at = torch.full((N,), y, dtype=torch.float64)
        width = (temperature / channel.stiffness(at)).sqrt()
        x = torch.stack((width * torch.randn(N, generator=g, dtype=torch.float64), at), 1)
        force = channel.force(x)[:, 1]
        error = float(force.std()) / math.sqrt(N)
        wanted = float(channel.effective_force(temperature, at[:1]))
        assert abs(float(force.mean()) - wanted) < 4 * error < 0.1 * abs(wanted)
