"""Orders of convergence of the Langevin integrators, and their exact moments in a harmonic well.

An integrator of a linear force is linear in its start and its noise. Run once with a unit impulse
of noise at each step, it shows its end's exact mean and variance: no sampling error.
"""

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from entropic_fast.dynamics import LangevinIntegrator, RidgePotential, simulate_langevin
from entropic_fast.ops.langevin.reference import SCHEMES, UNDERDAMPED, Coefficients, integrate

K, T, FRICTION = 4.0, 0.7, 1.5


def moments(scheme, dt, time, k=K, friction=FRICTION):
    """Mean (from x = 1, v = 0) and covariance at `time` of x, or of (x, v), by impulses."""
    steps = round(time / dt)
    # Particle 0 starts at 1 without noise; particle 1 + j at 0 with one unit of noise at step j.
    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x[0] = 1
    v = torch.zeros_like(x) if scheme in UNDERDAMPED else x.new_empty(0)

    def impulse(n):
        z = torch.zeros_like(x)
        z[1 + n] = 1
        return z

    coefficients = Coefficients.of(scheme, T, dt, friction)
    integrate(x, v, lambda y: -k * y, scheme, coefficients, steps, 0, impulse)
    end = torch.cat((x, v), 1) if v.numel() else x
    return end[0].numpy(), (end[1:].T @ end[1:]).numpy()


def exact_moments(scheme, time, k=K, friction=FRICTION):
    """Those of the stochastic differential equation: stationary S - e^(At) S e^(A^T t)."""
    if scheme in UNDERDAMPED:
        flow = linalg.expm(time * np.array([[0.0, 1.0], [-k, -friction]]))
        stationary = np.diag([T / k, T])
    else:
        flow = np.array([[math.exp(-k * time / friction)]])
        stationary = np.array([[T / k]])
    return flow[:, 0], stationary - flow @ stationary @ flow.T


def stationary_covariance(scheme, dt, k=K, friction=FRICTION):
    """Closed forms of the discrete chain's."""
    if scheme == "euler-maruyama":
        return np.array([[T / k / (1 - k * dt / friction / 2)]])
    if scheme == "leimkuhler-matthews":
        return np.array([[T / k]])
    return np.diag([T / k, T * (1 - k * dt * dt / 4)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dt", [0.05, 0.3])
def test_stationary_moments_are_the_schemes_closed_forms(scheme, dt):
    mean, covariance = moments(scheme, dt, 60.0)
    assert np.abs(mean).max() < 1e-12
    np.testing.assert_allclose(covariance, stationary_covariance(scheme, dt), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("scheme", "order"), [("euler-maruyama", 1), ("leimkuhler-matthews", 1), ("baoab", 2)]
)
def test_weak_order_at_a_fixed_time(scheme, order):
    """Errors of mean and covariance fall by 2^order when the step is halved.

    Leimkuhler-Matthews gains its second order in the stationary state only.
    """
    exact = exact_moments(scheme, 1.0)
    errors = []
    for dt in (1 / 64, 1 / 128):
        pairs = zip(moments(scheme, dt, 1.0), exact, strict=True)
        errors.append(np.concatenate([(a - b).ravel() for a, b in pairs]))
    seen = np.abs(errors[1]) > 1e-9
    assert seen.any()
    ratios = errors[0][seen] / errors[1][seen]
    np.testing.assert_allclose(ratios, 2.0**order, rtol=0.1)


def test_euler_s_stationary_error_is_of_first_order_and_baoab_s_of_second():
    def errors(scheme):
        return [moments(scheme, dt, 60.0)[1][-1, -1] for dt in (0.05, 0.025)]

    euler = np.array(errors("euler-maruyama")) - T / K
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.1)
    baoab = np.array(errors("baoab")) - T  # of the velocities; that of positions is 0
    assert baoab[0] / baoab[1] == pytest.approx(4, rel=1e-6)


def test_euler_s_paths_converge_with_order_one():
    """Additive noise: the same Brownian path, in steps of 2, 4 and 8 parts of the finest."""
    g = torch.Generator().manual_seed(0)
    fine, dt, particles = 2048, 1 / 1024, 400
    z = torch.randn(fine, particles, 1, generator=g, dtype=torch.float64)

    def force(x):
        return 2 * torch.sin(2 * x) - x  # x^2 / 2 + cos 2x: not linear

    def end(parts):
        x = torch.linspace(-2, 2, particles, dtype=torch.float64)[:, None].contiguous()
        coarse = z.view(fine // parts, parts, particles, 1).sum(1) / math.sqrt(parts)
        c = Coefficients.of("euler-maruyama", T, parts * dt, 1.0)
        integrate(
            x, x.new_empty(0), force, "euler-maruyama", c, fine // parts, 0, lambda n: coarse[n]
        )
        return x

    finest = end(1)
    errors = [float((end(parts) - finest).abs().mean()) for parts in (8, 16, 32)]
    # Against a path of step 1 an error is C (parts - 1), hence 15 / 7 and 31 / 15.
    assert errors[1] / errors[0] == pytest.approx(15 / 7, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(31 / 15, rel=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dt", [0.05, 0.3])
def test_the_kernel_s_variance_is_the_discrete_one(scheme, dt):
    """The default backend across a ridge of equal stiffness; its chi-square test has the power
    to tell the discrete variance from that of the equation where they differ."""
    n, level = 100_000, 1e-4
    ridge = RidgePotential(K, K, length=1.0, wall=1.0)
    start = torch.zeros(n, 2, dtype=torch.float64)
    run = simulate_langevin(
        ridge,
        start,
        LangevinIntegrator(T, dt, scheme=scheme, friction=FRICTION),
        round(40 / dt),
        seed=6,
    )
    found = (
        [run.final[:, 0]] if run.velocities is None else [run.final[:, 0], run.velocities[-1, :, 0]]
    )
    for seen, variance, limit in zip(
        found, np.diag(stationary_covariance(scheme, dt)), (T / K, T), strict=False
    ):

        def tail(v, seen=seen):
            # n s^2 / variance is chi-square distributed with n degrees of freedom.
            lower = stats.chi2.cdf(float(seen.square().sum()) / v, n)
            return 2 * min(lower, 1 - lower)

        assert tail(variance) > level
        if abs(variance / limit - 1) > 0.03:
            assert tail(limit) < level
