"""Stochastic Lanczos quadrature against spectra known exactly."""

import math

import numpy as np
import pytest
import torch
from cases import by_name
from torch import Tensor

from entropic_fast.curvature import DensitySettings, HessianOperator, spectral_density
from entropic_fast.curvature.estimators import _density as density
from entropic_fast.curvature.estimators._density import density_and_pairs
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


def test_full_steps_give_the_exact_measure_of_each_probe():
    """With P steps the nodes are the eigenvalues, the weights the squared components."""
    values = torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 7.0]).double()
    matrix = with_spectrum(values)
    got = spectral_density(matrix, DensitySettings(probes=3, steps=50))
    assert got.nodes.shape == got.weights.shape == (3, 6)
    eigenvectors = torch.linalg.eigh(matrix).eigenvectors
    for i in range(3):
        probe = random.normal((6,), random.fold_in(0, "density"), i)
        expected = (eigenvectors.T @ (probe / probe.norm())).square()
        assert torch.allclose(got.nodes[i], values, atol=1e-11)
        assert torch.allclose(got.weights[i], expected, atol=1e-10)


def test_quadrature_is_exact_for_polynomials_up_to_twice_the_steps():
    matrix = with_spectrum(random.normal((40,), 7))
    steps = 6
    got = spectral_density(matrix, DensitySettings(probes=2, steps=steps))
    for i in range(2):
        v = random.normal((40,), random.fold_in(0, "density"), i)
        v = v / v.norm()
        power = v
        for degree in range(1, 2 * steps):
            power = matrix @ power
            moment = float((got.weights[i] * got.nodes[i] ** degree).sum())
            assert moment == pytest.approx(float(v @ power), rel=1e-9, abs=1e-10)


def test_weights_of_each_probe_sum_to_one_and_the_density_integrates_to_one():
    got = spectral_density(
        with_spectrum(torch.linspace(-1, 2, 70).double()), DensitySettings(probes=5, steps=20)
    )
    assert torch.allclose(got.weights.sum(1), torch.ones(5).double(), atol=1e-12)
    assert bool((got.weights >= 0).all())
    assert float(torch.trapezoid(got.density, got.grid)) == pytest.approx(1, abs=1e-3)
    assert got.size == 70


def test_moments_agree_with_the_traces():
    values = torch.cat([torch.zeros(80), torch.linspace(1, 3, 20)]).double()
    got = spectral_density(with_spectrum(values), DensitySettings(probes=60, steps=30))
    for power in (1, 2):
        samples = (got.weights * got.nodes**power).sum(1)
        error = float(samples.std()) / 60**0.5
        assert abs(float(samples.mean()) - float((values**power).mean())) < 4 * error


def test_multiple_eigenvalues_have_their_share_of_the_weight():
    values = torch.tensor([-1.0] * 30 + [0.0] * 50 + [2.0] * 20).double()
    got = spectral_density(with_spectrum(values), DensitySettings(probes=80, steps=10))
    distance = (got.nodes[..., None] - torch.tensor([-1.0, 0.0, 2.0]).double()).abs()
    assert float((distance.amin(2) * got.weights).max()) < 1e-10
    share = ((distance < 1e-6) * got.weights[..., None]).sum(1)
    z = (share.mean(0) - torch.tensor([0.3, 0.5, 0.2]).double()) / (share.std(0) / 80**0.5)
    assert float(z.abs().max()) < 4


def test_traces_of_functions_are_within_their_standard_errors():
    """The z-scores of seeds have spread 1, whatever the function."""
    values = torch.linspace(0.1, 3, 60).double()
    matrix = with_spectrum(values)
    for function in (torch.log, torch.square, torch.exp):
        exact = float(function(values).sum())
        z = []
        for seed in range(60):
            estimate = spectral_density(
                matrix, DensitySettings(probes=20, steps=25), seed=seed
            ).trace(function)
            assert estimate.samples == 20
            z.append((estimate.value - exact) / estimate.std_error)
        assert 0.7 < float(np.std(z)) < 1.5 and abs(float(np.mean(z))) < 0.6
    constant = spectral_density(matrix, DensitySettings(probes=3, steps=4)).trace(torch.ones_like)
    assert constant.value == pytest.approx(60) and constant.std_error < 1e-12


def test_traces_of_functions_refuse_what_is_not_finite():
    got = spectral_density(
        with_spectrum(torch.linspace(-1, 1, 20).double()), DensitySettings(probes=2, steps=5)
    )
    with pytest.raises(ValueError, match="function: expected finite"):
        got.trace(torch.log)
    with pytest.raises(ValueError, match="function: expected values of shape"):
        got.trace(torch.sum)
    single = spectral_density(torch.eye(3), DensitySettings(probes=1)).trace(torch.square)
    assert single.value == pytest.approx(3) and math.isnan(single.std_error)


def test_moments_of_wishart_matrices():
    """tr A^m / P is 1, 1 + c, 1 + 3 c + c^2 for m = 1, 2, 3 (Marchenko and Pastur)."""
    n, p = 1200, 400
    c, x = p / n, random.normal((n, p), 4)
    got = spectral_density(x.T @ x / n, DensitySettings(probes=20, steps=20))
    for power, moment in ((1, 1.0), (2, 1 + c), (3, 1 + 3 * c + c * c)):
        estimate = got.trace(lambda t, power=power: t**power)
        # The matrix itself is a sample: its moments are off by a few times 1 / P.
        assert abs(estimate.value / p - moment) < 4 * estimate.std_error / p + 5 / p


def test_directions_left_out_leave_the_rest():
    """With all steps the nodes are the eigenvalues on the orthogonal complement."""
    values = torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 7.0]).double()
    matrix = with_spectrum(values)
    for r in (1, 2, 5):
        along = random.normal((6, r), r)
        z = torch.linalg.qr(along, mode="complete")[0][:, r:]
        exact = torch.linalg.eigvalsh(z.T @ matrix @ z)
        got = spectral_density(
            matrix,
            DensitySettings(probes=3, steps=50),
            orthogonal_to=along if r > 1 else along[:, 0],
        )
        assert got.size == 6 - r and got.nodes.shape == (3, 6 - r)
        assert torch.allclose(got.nodes, exact.expand(3, -1), atol=1e-10)
        assert torch.allclose(got.weights.sum(1), torch.ones(3).double())


def test_results_do_not_depend_on_when_they_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    low_rank = torch.cat([torch.zeros(40), torch.ones(5), torch.full((3,), 2.0)]).double()
    for values in (torch.linspace(-1, 1, 50).double(), low_rank, torch.zeros(7).double()):
        matrix = with_spectrum(values)
        each = spectral_density(matrix, DensitySettings(probes=3, steps=20))
        with monkeypatch.context() as patch:
            patch.setattr(density, "stride_of", lambda device: 4)
            late = spectral_density(matrix, DensitySettings(probes=3, steps=20))
        assert torch.equal(each.nodes, late.nodes) and torch.equal(each.weights, late.weights)


def test_operators_that_are_not_symmetric_or_finite_are_refused():
    with pytest.raises(ValueError, match="a symmetric one"):
        spectral_density(random.normal((30, 30), 0))
    with pytest.raises(ValueError, match="finite products"):
        spectral_density(torch.full((3, 3), float("nan")))


def test_wishart_matrices_follow_marchenko_and_pastur():
    n, p = 1200, 400
    ratio = p / n
    x = random.normal((n, p), 1)
    got = spectral_density(x.T @ x / n, DensitySettings(probes=20, steps=60, sigma=0.05))
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    fine = torch.linspace(low, high, 4001).double()
    law = ((high - fine) * (fine - low)).clamp(min=0).sqrt() / (2 * math.pi * ratio * fine)
    kernel = torch.exp(-0.5 * ((got.grid[:, None] - fine) / 0.05) ** 2)
    smooth = torch.trapezoid(kernel * law, fine) / (0.05 * math.sqrt(2 * math.pi))
    gap = (got.density - smooth).abs()  # of 400 eigenvalues from the law of infinitely many
    assert bool((gap <= 5 * got.std_error + 0.01 * float(smooth.max())).all())
    assert float(got.std_error.max()) < 0.05 * float(smooth.max())


def test_standard_error_is_calibrated():
    """The exact smoothed density lies within two standard errors 95 % of the time."""
    values = torch.linspace(-1, 1, 40).double()
    matrix = with_spectrum(values)
    grid = torch.tensor([-0.5, 0.0, 0.7]).double()
    exact = torch.exp(-0.5 * ((grid[:, None] - values) / 0.1) ** 2).mean(1)
    exact /= 0.1 * math.sqrt(2 * math.pi)
    covered = []
    for seed in range(60):
        got = spectral_density(
            matrix, DensitySettings(probes=12, steps=40, sigma=0.1, grid=grid), seed=seed
        )
        covered.append(((got.density - exact).abs() <= 2 * got.std_error).numpy())
    assert 0.85 < np.mean(covered) < 0.99


def test_one_probe_has_no_standard_error():
    assert spectral_density(torch.eye(3), DensitySettings(probes=1)).std_error.isnan().all()


def test_the_default_grid_covers_the_ritz_values():
    got = spectral_density(
        with_spectrum(random.normal((50,), 3)), DensitySettings(steps=25, points=77)
    )
    assert got.grid.shape == got.density.shape == got.std_error.shape == (77,)
    assert float(got.grid[0]) < float(got.nodes.min()) - 4 * got.sigma
    assert float(got.grid[-1]) > float(got.nodes.max()) + 4 * got.sigma


@pytest.mark.parametrize("scale", [0.0, 1.0, -3.0])
def test_a_single_eigenvalue_is_one_peak(scale: float):
    got = spectral_density(scale * torch.eye(5).double(), DensitySettings(probes=2, steps=4))
    assert torch.allclose(got.nodes, torch.tensor(scale).double(), atol=1e-12)
    assert torch.allclose(got.weights[:, 1:], torch.tensor(0.0).double(), atol=1e-12)
    assert float(torch.trapezoid(got.density, got.grid)) == pytest.approx(1, abs=1e-3)


def test_one_parameter():
    got = spectral_density(torch.tensor([[2.0]]), DensitySettings(probes=2))
    assert got.nodes.tolist() == [[2.0], [2.0]] and got.weights.tolist() == [[1.0], [1.0]]


def test_probes_do_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch):
    matrix = with_spectrum(random.normal((30,), 3))
    together = []
    original = density._lanczos

    def record(operator, starts, steps):
        together.append(len(starts))
        return original(operator, starts, steps)

    monkeypatch.setattr(density, "_lanczos", record)
    whole = spectral_density(matrix, DensitySettings(probes=5, steps=10))
    pieces = spectral_density(
        matrix, DensitySettings(probes=5, steps=10), memory_budget=2 * 14 * 30 * 8
    )
    assert together == [5, 2, 2, 1]
    assert torch.allclose(whole.nodes, pieces.nodes, atol=1e-11)
    assert torch.allclose(whole.weights, pieces.weights, atol=1e-11)


def test_float32_hessians_agree_with_float64():
    case = by_name("attention")
    exact, rounded = (
        spectral_density(
            HessianOperator(case.objective(dtype=dtype)),
            DensitySettings(probes=4, steps=20, sigma=0.05, grid=torch.linspace(-0.5, 1, 50)),
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert torch.allclose(exact.density, rounded.density, atol=1e-3 * float(exact.density.max()))


def test_smoothed_density_of_a_hessian_is_that_of_its_eigenvalues():
    obj = by_name("tied weight").objective()
    operator = HessianOperator(obj)
    matrix = operator @ torch.eye(obj.num_params).double()
    values = torch.linalg.eigvalsh(matrix)
    got = spectral_density(matrix, DensitySettings(probes=300, steps=40, sigma=0.1))
    exact = torch.exp(-0.5 * ((got.grid[:, None] - values) / 0.1) ** 2).mean(1)
    exact /= 0.1 * math.sqrt(2 * math.pi)
    few = spectral_density(operator, DensitySettings(probes=2, steps=40, sigma=0.1))
    assert torch.allclose(few.nodes, got.nodes[:2], atol=1e-9)
    assert bool(((got.density - exact).abs() <= 5 * got.std_error + 1e-9).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes"),
        ({"steps": 0}, "steps"),
        ({"points": 1}, "points"),
        ({"sigma": 0.0}, "sigma"),
        ({"grid": torch.zeros(0)}, "grid"),
        ({"grid": torch.zeros(2, 2)}, "grid"),
        ({"grid": torch.tensor([float("nan")])}, "grid"),
        (
            {"orthogonal_to": torch.ones(3)},
            r"expected a tensor \[4\] or \[4, r\], r under 4",
        ),
        ({"orthogonal_to": torch.eye(4)}, "orthogonal_to: expected a tensor"),
        ({"orthogonal_to": torch.zeros(4)}, "orthogonal_to: expected independent directions"),
        ({"orthogonal_to": torch.ones(4, 2)}, "orthogonal_to: expected independent directions"),
        ({"orthogonal_to": torch.full((4,), math.inf)}, "orthogonal_to: expected finite"),
        ({"memory_budget": 10}, "memory_budget: expected at least"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fields = arguments.keys() & {"probes", "steps", "points", "sigma", "grid"}
        settings = DensitySettings(**{name: arguments[name] for name in fields})
        others = {name: arguments[name] for name in arguments.keys() - fields}
        spectral_density(torch.eye(4), settings, **others)


def test_a_grid_too_coarse_for_its_peaks_is_refused():
    with pytest.raises(ValueError, match=r"points: expected at least .* 1.5 sigma"):
        spectral_density(
            with_spectrum(random.normal((50,), 3)), DensitySettings(steps=5, sigma=1e-4)
        )


@pytest.mark.parametrize("steps", [1, 8, 25])
def test_the_same_products_give_the_largest_ritz_pairs_and_their_residuals(steps: int):
    matrix = with_spectrum(torch.linspace(-1, 2, 90).double().exp())
    along = random.normal((90, 2), 8)
    for left_out in (None, along):
        got, pairs = density_and_pairs(
            matrix, DensitySettings(4, steps), kept=5, orthogonal_to=left_out
        )
        plain = spectral_density(matrix, DensitySettings(4, steps), orthogonal_to=left_out)
        assert torch.equal(got.nodes, plain.nodes) and torch.equal(got.weights, plain.weights)
        kept = min(5, steps)
        assert pairs.vectors.shape == (90, kept) and pairs.matvecs == 4 * steps
        assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(kept).double(), atol=1e-12)
        assert float(pairs.values[0]) == float(got.nodes.max())
        q = torch.eye(90).double()
        if left_out is not None:
            u = torch.linalg.qr(along)[0]
            q = q - u @ u.T
            assert float((u.T @ pairs.vectors).abs().max()) < 1e-12
        rest = q @ matrix @ q @ pairs.vectors - pairs.values * pairs.vectors
        assert torch.allclose(rest.norm(dim=0), pairs.residuals, atol=1e-12)


def test_the_largest_ritz_pairs_do_not_depend_on_the_memory():
    matrix = with_spectrum(random.normal((30,), 3))
    (_, whole), (_, pieces) = (
        density_and_pairs(matrix, DensitySettings(5, 10), memory_budget=budget, kept=3)
        for budget in (None, 2 * 14 * 30 * 8)
    )
    assert whole.matvecs == pieces.matvecs == 50
    assert torch.allclose(whole.values, pieces.values, atol=1e-11)
    assert torch.allclose(whole.residuals, pieces.residuals, atol=1e-11)


def test_multiple_eigenvalues_have_exact_ritz_pairs():
    """Krylov spaces end, or go on by rounding: every pair is one of the matrix all the same."""
    values = torch.tensor([-1.0] * 5 + [0.0] * 5 + [2.0] * 5).double()
    for matrix in (with_spectrum(values), torch.diag(values), 3 * torch.eye(15).double()):
        _, pairs = density_and_pairs(matrix, DensitySettings(3, 9), kept=4)
        rest = matrix @ pairs.vectors - pairs.values * pairs.vectors
        assert float(pairs.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]))
        assert float(rest.norm(dim=0).max()) < 1e-12
        assert float(pairs.residuals.max()) < 1e-12
