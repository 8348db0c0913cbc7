"""How far the quadrature of few Lanczos steps is off, beside its standard error."""

import math

import pytest
import torch
from torch import Tensor

from entropic_fast._utils.results import Density, Estimate
from entropic_fast.curvature import (
    CurvatureSettings,
    DensitySettings,
    curvature_at,
    density_log_determinant,
    log_determinant,
    spectral_density,
)
from entropic_fast.curvature.estimators import _density as density
from entropic_fast.curvature.estimators._quadrature import gauss_rule, other_rules
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits import streams as random

# Small matrices with few probes and steps on purpose: how they miss is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")


@pytest.fixture(autouse=True)
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any order are estimated, not formed."""
    monkeypatch.setattr(density, "EXACT", 0)


FUNCTIONS = {
    "log of little": lambda x: (x.clamp(min=0) + 5e-4).log(),
    "log of less": lambda x: (x.clamp(min=0) + 1e-6).log(),
    "log of more": lambda x: (x.clamp(min=0) + 0.05).log(),
    "negative mass": lambda x: (-x).clamp(min=0),
    "count": lambda x: (x > 0.3).double(),
    "exp": lambda x: (-x).exp(),
}


def spectra(seed: int, size: int = 160) -> dict[str, Tensor]:
    half, many = size // 2, size - 15
    u, v = random.uniform((size,), seed, 0), random.uniform((size,), seed, 1)
    n = random.normal((size,), seed, 2)
    widely = (19 * u - 16).exp()
    return {
        "half zeros": torch.cat([torch.zeros(half).double(), 2 * u[half:]]),
        "half zeros, both signs": torch.cat([torch.zeros(half).double(), n[half:]]),
        "power law": 5 * torch.arange(1, size + 1).double() ** -2 * (0.5 + u),
        "bulk and outliers": torch.cat([0.02 * n[:many], 1 + 9 * u[many:]]),
        "indefinite": n,
        "all scales": widely,
        "all scales, both signs": torch.cat([widely[:100], -(14 * v[100:] - 16).exp()]),
        "far from 0": 0.1 + 3 * v,
    }


def matrix_of(values: Tensor, seed: int) -> Tensor:
    q = torch.linalg.qr(random.normal((len(values), len(values)), seed))[0]
    return q * values @ q.T


@pytest.mark.parametrize(("probes", "steps", "share"), [(16, 40, 1), (64, 20, 0.9), (32, 10, 0.9)])
def test_twice_the_error_covers_where_twice_the_standard_error_does_not(probes, steps, share):
    covered, without = [], []
    for seed in range(3):
        for name, values in spectra(seed).items():
            density = spectral_density(
                matrix_of(values, seed), DensitySettings(probes, steps, 1.0), seed=seed
            )
            for what, function in FUNCTIONS.items():
                exact, got = float(function(values).sum()), density.trace(function)
                gap = abs(got.value - exact) - 1e-9 * (1 + abs(exact))
                covered.append(gap <= 2 * got.error)
                without.append(gap <= 2 * got.std_error)
                assert gap <= 4 * got.error, (name, what)
    assert len(covered) == 144 and sum(covered) >= 0.95 * 144
    assert sum(without) < share * sum(covered)


def test_smooth_functions_have_no_error_of_quadrature():
    for name, values in spectra(0).items():
        got = spectral_density(matrix_of(values, 0), DensitySettings(16, 40)).trace(
            FUNCTIONS["exp"]
        )
        assert got.quadrature < 1e-6 * got.std_error, name
    got = spectral_density(matrix_of(spectra(0)["far from 0"], 0), DensitySettings(8, 60)).trace(
        torch.log
    )
    assert got.quadrature < 1e-3 * got.std_error  # not finite at 0


def test_log_determinants_of_singular_matrices_state_their_bias():
    values = torch.cat([torch.zeros(100), torch.linspace(0.01, 2, 100)]).double()
    matrix, delta = matrix_of(values, 1), 1e-6
    exact = float((values + delta).log().sum())
    for seed in range(6):
        got = log_determinant(matrix, delta=delta, seed=seed, density=DensitySettings(steps=20))
        gap = abs(got.value - exact)
        assert gap > 4 * got.std_error  # more probes do not help
        assert gap < 2 * got.error
        assert got.quadrature < 3 * gap
    top = log_determinant(matrix, k=5, delta=delta, density=DensitySettings(probes=32, steps=20))
    assert abs(top.value - exact) > 4 * top.std_error and top.bound < 0.1
    assert abs(top.value - exact) < 2 * top.error


def test_the_error_falls_with_steps_and_not_with_probes():
    matrix = matrix_of(spectra(2)["bulk and outliers"], 2)
    few, many, long = (
        log_determinant(matrix, delta=5e-4, density=DensitySettings(probes=probes, steps=steps))
        for probes, steps in ((8, 30), (64, 30), (8, 100))
    )
    assert many.quadrature == pytest.approx(few.quadrature, rel=0.5)
    assert many.std_error < 0.6 * few.std_error
    assert long.quadrature < 0.5 * few.quadrature


def test_nothing_is_left_where_all_steps_are_taken():
    for values in (torch.randn(20).double(), torch.tensor([0.0] * 9 + [1.0] * 6 + [2.0] * 5)):
        matrix = matrix_of(values.double(), 3)
        for function in FUNCTIONS.values():
            assert (
                spectral_density(matrix, DensitySettings(5, 20)).trace(function).quadrature == 0.0
            )
    assert log_determinant(torch.eye(3), delta=1.0).quadrature == 0.0
    assert log_determinant(torch.eye(3), k=2).quadrature == 0.0


def test_one_step_has_the_node_at_zero_to_compare():
    density = spectral_density(
        torch.diag(torch.tensor([1.0, 2.0, 4.0])).double(), DensitySettings(4, 1)
    )
    assert density_log_determinant(density, 0.1).quadrature > 0
    assert density.trace(lambda x: x).quadrature < 1e-12  # exact for lines


def test_rules_of_fewer_steps_and_with_a_node_at_zero_have_the_moments():
    density = spectral_density(matrix_of(random.normal((40,), 5), 5), DensitySettings(3, 8))
    assert len(density.others) == 4
    for (nodes, weights), exact in zip(density.others, (7, 11, 13, 16), strict=True):
        assert torch.allclose(weights.sum(1), torch.ones(3).double())
        for power in range(exact + 1):
            # The Gauss rule of 8 steps has them up to 15 itself.
            other, own = (weights * nodes**power).sum(1), density.weights * density.nodes**power
            if power <= 15:
                assert torch.allclose(other, own.sum(1), rtol=1e-7, atol=1e-9)
    assert bool((density.others[3][0] == 0).any(1).all())


def test_a_zero_among_the_nodes_needs_no_other():
    one = torch.ones(2).double()
    rules = other_rules(one, one, 1e-9)  # of nodes 0 and 2
    assert len(rules) == 4
    for mine, other in zip(gauss_rule(one, one), rules[3], strict=True):
        assert torch.allclose(mine, other, atol=1e-5) or float(other.abs().min()) == 0


def test_densities_without_other_rules_do_not_know():
    line = torch.ones(1, 2).double()
    got = Density(line[0], line[0], line[0], line, line / 2, 0.1, 2).trace(torch.square)
    assert got.value == 2 and math.isnan(got.quadrature)
    assert Estimate(1.0, 3.0, 2, 4.0).error == 5.0 and Estimate(1.0, 3.0, 2).error == 3.0
    assert str(Estimate(1.0, 3.0, 2, 4.0)) == "1 ± 3 ± 4 of quadrature (2 samples)"


def test_columns_of_a_profile_have_their_errors_of_quadrature():
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
    data = random.normal((30, 6), 1), torch.arange(30) % 3
    obj = Objective(torch.nn.Sequential(*layers).double(), "cross_entropy", data)
    row = curvature_at(
        obj,
        quantities=("density",),
        settings=CurvatureSettings(density=DensitySettings(steps=10, probes=16)),
    ).row
    exact = curvature_at(
        obj,
        quantities=("density",),
        settings=CurvatureSettings(density=DensitySettings(steps=200, probes=16)),
    ).row
    for name in ("log_determinant", "negative_mass"):
        assert exact[f"{name}_quadrature"] < 1e-6 * abs(exact[name])
        # The same probes: what remains is the quadrature's.
        assert 0 < abs(row[name] - exact[name]) < 2 * row[f"{name}_quadrature"]
