"""Log-determinants across directions against dense ones."""

import math

import numpy as np
import pytest
import torch
from cases import by_name
from torch import Tensor

from entropic_fast.curvature import (
    DensitySettings,
    HessianOperator,
    LanczosSettings,
    density_log_determinant,
    log_determinant,
    spectral_density,
)
from entropic_fast.curvature.estimators import _density as density
from entropic_fast.ops.random_bits import streams as random

# Small matrices with few probes and steps on purpose: how they miss is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")


@pytest.fixture(autouse=True)
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any order are estimated, not formed."""
    monkeypatch.setattr(density, "EXACT", 0)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random.normal((len(values), len(values)), seed))[0]
    return q * values @ q.T


def across(matrix: Tensor, along: Tensor) -> Tensor:
    """Eigenvalues, descending, on what is orthogonal to the columns of `along` [P, r]."""
    z = torch.linalg.qr(along, mode="complete")[0][:, along.shape[1] :]
    return torch.linalg.eigvalsh(z.T @ matrix @ z).flip(0)


@pytest.mark.parametrize("r", [0, 1, 3])
def test_all_eigenvalues_give_the_determinant(r: int):
    matrix = with_spectrum(torch.logspace(-2, 2, 12).double())
    along = random.normal((12, r), 1)
    exact = float(across(matrix, along).log().sum())
    got = log_determinant(
        matrix, orthogonal_to=along if r else None, k=12 - r, lanczos=LanczosSettings(tol=1e-8)
    )
    assert got.count == 12 - r and got.std_error == 0.0 and got.pairs is not None
    assert got.value == pytest.approx(exact, abs=1e-6) and got.bound < 1e-5
    if r == 0:
        assert exact == pytest.approx(float(torch.logdet(matrix)))


def test_the_largest_alone():
    values = torch.cat([torch.linspace(0, 1, 100), torch.tensor([3.0, 5.0, 9.0])]).double()
    matrix = with_spectrum(values)
    along = random.normal((103,), 2)
    exact = across(matrix, along[:, None])
    got = log_determinant(matrix, orthogonal_to=7 * along, k=3)
    assert got.value == pytest.approx(float(exact[:3].log().sum()), abs=1e-4)
    assert abs(got.value - float(exact[:3].log().sum())) <= got.bound < 0.01
    assert float(got) == got.value and (got.floor, got.delta) == (0.0, 0.0)
    again = log_determinant(matrix, orthogonal_to=along, k=3, v0=got.pairs)
    assert again.pairs is not None and again.pairs.matvecs == 3


def test_the_bound_covers_what_few_products_leave_open():
    matrix = with_spectrum(torch.linspace(1, 2, 100).double())
    exact = math.log(2)
    for most in (1, 2, 3, 5):
        got = log_determinant(matrix, k=1, lanczos=LanczosSettings(max_matvecs=most))
        assert got.pairs is not None and not got.pairs.converged
        low, high = got.value - got.bound, got.value + got.bound
        assert any(low <= math.log(v) <= high for v in torch.linspace(1, 2, 100).tolist())
        assert got.value < exact


def test_eigenvalues_at_the_floor_and_below_are_left_out():
    values = torch.tensor([4.0, 2.0, 0.5, 0.1, 0.0, 0.0, -1.0, -3.0]).double()
    matrix = with_spectrum(values)
    for floor, count in ((0.0, 4), (0.2, 3), (1.0, 2), (10.0, 0)):
        got = log_determinant(matrix, k=8, floor=floor)
        assert got.count == count and got.floor == floor
        assert got.value == pytest.approx(float(values[:count].log().sum()), abs=1e-9)


def test_the_directions_left_out_do_not_come_back_as_zeros():
    """Of a negative operator the zeros along them would be the largest eigenvalues."""
    along = random.normal((9, 3), 0)
    for sign, count in ((1.0, 2), (-1.0, 0)):
        matrix = with_spectrum(torch.tensor([2.0, 1.0] + [0.0] * 4 + [-1.0] * 3).double())
        matrix = sign * matrix if sign > 0 else -torch.eye(9).double()
        exact = across(matrix, along)
        kept = exact[exact > 1e-12]
        got = log_determinant(matrix, orthogonal_to=along, k=6)
        assert got.count == len(kept) <= count
        assert got.value == pytest.approx(float(kept.log().sum()), abs=1e-9)
        both = log_determinant(
            matrix, orthogonal_to=along, k=6, delta=0.1, density=DensitySettings(probes=4)
        )
        whole = float((exact.clamp(min=0) + 0.1).log().sum())
        assert abs(both.value - whole) <= 5 * both.std_error + 1e-6


@pytest.mark.parametrize("k", [None, 5])
def test_quadrature_covers_the_regularized_sum(k: int | None):
    values = torch.cat([torch.linspace(-0.2, 0.3, 80), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])])
    matrix = with_spectrum(values.double())
    along = random.normal((85, 2), 3)
    exact = float((across(matrix, along).clamp(min=0) + 0.05).log().sum())
    z = []
    for seed in range(40):
        got = log_determinant(
            matrix,
            orthogonal_to=along,
            k=k,
            delta=0.05,
            seed=seed,
            density=DensitySettings(probes=12, steps=40),
        )
        assert got.count == 83 and got.delta == 0.05
        z.append((got.value - exact) / got.std_error)
    assert 0.6 < float(np.std(z)) < 1.6 and abs(float(np.mean(z))) < 0.7


def test_eigenvalues_found_one_by_one_lower_the_variance():
    values = torch.cat([torch.linspace(0, 0.3, 80), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])])
    matrix = with_spectrum(values.double())
    plain, helped = (
        log_determinant(matrix, k=k, delta=0.1, density=DensitySettings(probes=20))
        for k in (None, 5)
    )
    assert helped.std_error < 0.7 * plain.std_error


def test_a_density_already_there_serves():
    matrix = with_spectrum(torch.linspace(-1, 2, 30).double())
    density = spectral_density(matrix, DensitySettings(probes=6, steps=30))
    estimate = density_log_determinant(density, 0.3)
    direct = log_determinant(matrix, delta=0.3, density=DensitySettings(probes=6, steps=30))
    assert (estimate.value, estimate.std_error) == (direct.value, direct.std_error)
    assert direct.pairs is None and direct.bound == 0.0


def test_the_effective_potential_of_a_valley():
    """V = g(y) (x1^2 + x2^2) / 2 along y: (T / 2) log det across the path is T log g."""
    for y in (-1.0, 0.0, 2.0):
        g = 1 + y * y
        hessian = torch.diag(torch.tensor([g, g, 0.7]).double())  # at x = 0
        tangent = torch.tensor([0.0, 0.0, 5.0]).double()
        assert float(log_determinant(hessian, orthogonal_to=tangent, k=2)) / 2 == pytest.approx(
            math.log(g)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hessians_of_networks(dtype: torch.dtype):
    operator = HessianOperator(by_name("layer norm").objective(dtype=dtype))
    size = operator.shape[0]
    matrix = (operator @ torch.eye(size, dtype=dtype)).double()
    along = random.normal((size,), 0)
    exact = across((matrix + matrix.T) / 2, along[:, None])
    got = log_determinant(operator, orthogonal_to=along, k=4)
    assert got.value == pytest.approx(float(exact[:4].log().sum()), abs=1e-3)
    whole = log_determinant(
        operator, orthogonal_to=along, k=4, delta=1e-2, density=DensitySettings(probes=16)
    )
    expected = float((exact.clamp(min=0) + 1e-2).log().sum())
    assert abs(whole.value - expected) < 5 * whole.std_error + 1e-3


def test_one_direction_left():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 5.0]]).double()
    along = torch.tensor([1.0, 0.0])
    assert float(log_determinant(matrix, orthogonal_to=along, k=1)) == pytest.approx(math.log(5))
    assert float(log_determinant(matrix, orthogonal_to=along, delta=1.0)) == pytest.approx(
        math.log(6)
    )
    assert float(log_determinant(matrix, orthogonal_to=along, k=1, delta=1.0)) == pytest.approx(
        math.log(6)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "k, delta: expected at least one of the two"),
        ({"k": 0}, "k: expected an integer"),
        (
            {"k": 4, "orthogonal_to": torch.ones(4)},
            "k: expected at most the 3 directions",
        ),
        ({"k": 1, "floor": -1.0}, "floor"),
        ({"k": 1, "floor": 0.5, "delta": 1.0}, "floor: expected 0 with delta"),
        ({"delta": 0.0}, "delta"),
        (
            {"k": 1, "orthogonal_to": torch.zeros(4)},
            "orthogonal_to: expected independent directions",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_determinant(torch.eye(4), **arguments)
