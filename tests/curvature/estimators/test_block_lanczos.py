"""Lanczos against dense eigenvalues, SciPy, and spectra known in closed form."""

import numpy as np
import pytest
import torch
from cases import by_name
from scipy.sparse.linalg import eigsh
from torch import Tensor

import entropic_fast as ef
from entropic_fast.curvature import HessianOperator, top_eigenvalues
from entropic_fast.curvature.estimators import _block_lanczos as krylov
from entropic_fast.ops.random_bits import streams as random

WHICH = ("LA", "SA", "LM", "BE")


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random.normal((n, n), seed))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    return q * values @ q.T


def wanted(values: Tensor, which: str, k: int) -> Tensor:
    if which == "SA":
        return values.sort().values[:k]
    if which == "LA":
        return values.sort(descending=True).values[:k]
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    ascending = values.sort().values
    return torch.cat([ascending[: k // 2], ascending[len(values) - (k + 1) // 2 :]]).flip(0)


def require_eigenpairs(matrix: Tensor, pairs, k: int, tol: float) -> None:
    """Shapes, orthonormal vectors, and residuals that are what they say."""
    n = len(matrix)
    assert pairs.values.shape == (k,) and pairs.vectors.shape == (n, k)
    gram = pairs.vectors.T @ pairs.vectors
    assert torch.allclose(
        gram,
        torch.eye(k, dtype=matrix.dtype),
        atol=1e-5 if matrix.dtype == torch.float32 else 1e-12,
    )
    true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    scale = float(torch.linalg.matrix_norm(matrix, 2)) or 1.0
    eps = torch.finfo(matrix.dtype).eps
    assert torch.allclose(true, pairs.residuals, rtol=1e-2, atol=50 * eps * scale)
    assert bool((pairs.residuals <= (tol * pairs.values.abs()).clamp(min=10 * eps * scale)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (7, 7), (60, 1), (60, 5), (150, 3)])
def test_random_matrices(n: int, k: int, which: str, dtype: torch.dtype):
    matrix = random.normal((n, n), n)
    matrix = (matrix + matrix.T).to(dtype)
    tol = 1e-4
    pairs = top_eigenvalues(matrix, k, tol=tol, which=which)
    assert pairs.converged and pairs.values.dtype == dtype
    require_eigenpairs(matrix, pairs, k, tol)
    exact = wanted(torch.linalg.eigvalsh(matrix.double()), which, k)
    # The residual bounds the distance to some eigenvalue; its square over the gap to this one.
    assert torch.allclose(pairs.values.double(), exact, rtol=1e-4, atol=1e-4)


def test_scipy_agrees_on_a_hessian():
    obj = by_name("transformer layer").objective()
    operator = HessianOperator(obj)
    for which in WHICH:
        pairs = top_eigenvalues(operator, 4, tol=1e-8, which=which)
        expected = eigsh(
            operator.to_scipy(),
            k=4,
            which=which,
            tol=1e-10,
            v0=np.ones(obj.num_params),
            return_eigenvectors=False,
        )
        assert pairs.converged
        assert np.allclose(np.sort(pairs.values.numpy()), np.sort(expected), atol=1e-9)


def test_lobpcg_agrees():
    matrix = with_spectrum(torch.linspace(-1, 2, 90).double() ** 3)
    expected, _ = torch.lobpcg(matrix, k=3, X=random.normal((90, 3), 5), niter=500, tol=1e-12)
    pairs = top_eigenvalues(matrix, 3, tol=1e-9)
    assert torch.allclose(pairs.values, expected, rtol=1e-8)


def test_counted_products_are_those_spent():
    operator = HessianOperator(by_name("tied weight").objective())
    pairs = top_eigenvalues(operator, 2)
    assert pairs.matvecs == operator.products


def test_restarts_reach_clustered_eigenvalues(monkeypatch: pytest.MonkeyPatch):
    """A small basis that restarts many times ends at the same eigenpairs."""
    values = torch.cat([torch.linspace(0, 1, 180), torch.tensor([1.05, 1.1, 1.2])]).double()
    matrix = with_spectrum(values)
    monkeypatch.setattr(krylov, "EXTRA_COLUMNS", 9)
    monkeypatch.setattr(krylov, "COMPLETE", 0)
    pairs = top_eigenvalues(matrix, 3, tol=1e-9)
    assert pairs.converged and pairs.matvecs > 3 * (3 + 9)
    require_eigenpairs(matrix, pairs, 3, 1e-9)
    assert torch.allclose(pairs.values, values.flip(0)[:3], atol=1e-12)


@pytest.mark.parametrize("extra", [2, 3, 40])
def test_long_runs_grow_no_ghosts(extra: int, monkeypatch: pytest.MonkeyPatch):
    """An isolated eigenvalue converges at once; without reorthogonalization it comes again."""
    monkeypatch.setattr(krylov, "EXTRA_COLUMNS", extra)
    monkeypatch.setattr(krylov, "COMPLETE", 0)
    values = torch.cat([torch.linspace(-1, 1, 120), torch.tensor([1e3, 1e6])]).double()
    pairs = top_eigenvalues(with_spectrum(values), 4, tol=1e-6, max_matvecs=3000)
    assert torch.allclose(pairs.values, values.sort(descending=True).values[:4], atol=1e-6)


def test_multiple_eigenvalues_are_found_once_the_krylov_space_is_exhausted():
    for values in (
        torch.ones(6),
        torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0, -1.0]),
    ):
        matrix = with_spectrum(values.double())
        for which in WHICH:
            pairs = top_eigenvalues(matrix, len(values), which=which)
            assert pairs.converged
            assert torch.allclose(
                pairs.values, wanted(values.double(), which, len(values)), atol=1e-12
            )


def test_low_rank_matrices():
    factor = random.normal((50, 2), 1)
    matrix = factor @ factor.T
    pairs = top_eigenvalues(matrix, 5)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:5]
    assert pairs.converged and torch.allclose(pairs.values, exact, atol=1e-12)
    require_eigenpairs(matrix, pairs, 5, 1e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_the_zero_operator(k: int):
    pairs = top_eigenvalues(torch.zeros(3, 3), k)
    assert pairs.converged and not pairs.values.any() and not pairs.residuals.any()


def test_an_eigenvector_as_start_is_not_the_end():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    start = torch.tensor([0.0, 1.0, 0.0, 0.0])
    pairs = top_eigenvalues(matrix, 4, v0=start)
    assert torch.allclose(pairs.values, torch.tensor([4.0, 3.0, 2.0, 1.0]), atol=1e-5)


def test_a_good_start_saves_products():
    matrix = with_spectrum(torch.linspace(0, 1, 200).double())
    cold = top_eigenvalues(matrix, tol=1e-6)
    warm = top_eigenvalues(matrix, tol=1e-6, v0=cold.vectors[:, 0])
    assert warm.converged and warm.matvecs < cold.matvecs / 3


def test_wishart_edge():
    """Largest eigenvalue of X^T X / n near (1 + sqrt(p / n))^2 (Marchenko and Pastur)."""
    n, p = 900, 300
    x = random.normal((n, p), 2)
    top = float(top_eigenvalues(x.T @ x / n).values[0])
    assert top == pytest.approx((1 + (p / n) ** 0.5) ** 2, rel=0.05)


def test_too_few_products_are_said_to_be_too_few():
    matrix = with_spectrum(torch.linspace(0, 1, 300).double())
    with pytest.warns(ef.NotConvergedWarning, match=r"after 6 products.*raise max_matvecs"):
        pairs = top_eigenvalues(matrix, tol=1e-10, max_matvecs=6)
    assert not pairs.converged and pairs.matvecs == 6
    true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals)
    assert float(pairs.residuals[0]) > 1e-10


def test_a_tolerance_under_rounding_stops_at_the_floor():
    matrix = with_spectrum(torch.linspace(-1, 1, 80).double()).float()
    pairs = top_eigenvalues(matrix, 2, tol=1e-12, max_matvecs=5000)
    assert pairs.matvecs < 5000
    assert bool((pairs.residuals < 1e-5).all())


def test_seeds_change_the_start_and_not_the_answer():
    matrix = with_spectrum(torch.linspace(0, 1, 60).double() ** 4)
    a, b = (top_eigenvalues(matrix, tol=1e-8, seed=seed) for seed in (0, 1))
    again = top_eigenvalues(matrix, tol=1e-8, seed=0)
    assert torch.equal(a.vectors, again.vectors) and not torch.equal(a.vectors, b.vectors)
    assert torch.allclose(a.values, b.values, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer of at least 1"),
        ({"k": 5}, "k: expected at most the operator's order 4"),
        ({"tol": -1.0}, "tol"),
        ({"which": "XL"}, "which: expected one of 'LA', 'SA', 'LM', 'BE'"),
        ({"block": 0}, "block: expected an integer of at least 1"),
        ({"block": 3, "max_matvecs": 2}, "max_matvecs: expected at least the first block's 3"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs: expected at least k = 3"),
        ({"v0": torch.ones(3)}, r"v0: expected a tensor of shape \[4\]"),
        ({"v0": torch.ones(3, 2)}, r"v0: expected a tensor of shape \[4\] or \[4, r\]"),
        ({"v0": torch.ones(4, 5)}, r"v0: expected a tensor of shape \[4\] or \[4, r\]"),
        ({"v0": torch.ones(4, 0)}, r"v0: expected a tensor of shape \[4\] or \[4, r\]"),
        ({"v0": torch.zeros(4)}, "v0: expected a vector other than zero"),
        ({"v0": torch.zeros(4, 2)}, "v0: expected a vector other than zero"),
        ({"v0": torch.full((4,), float("inf"))}, "v0: expected finite"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(torch.eye(4), **arguments)


def test_operators_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a symmetric one"):
        top_eigenvalues(random.normal((20, 20), 0), 2)
    with pytest.raises(ValueError, match="a square shape"):
        top_eigenvalues(torch.ones(3, 2))
    for block in (1, 2):
        with pytest.raises(ValueError, match="finite products"):
            top_eigenvalues(torch.full((3, 3), float("nan")), block=block)


@pytest.mark.parametrize("seed", [1, 5])
def test_a_ritz_value_that_passes_near_zero_does_not_end_the_search(seed: int):
    """Its limit is relative to its value, and there smaller than the products' asymmetry."""
    generator = torch.Generator().manual_seed(seed)
    size = 300
    draws = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    vectors = torch.linalg.qr(next(draws))[0]
    spectrum = torch.linspace(-1, 1, size, dtype=torch.float64)
    spectrum[-5:] = torch.tensor([1.5, 1.7, 1.8, 1.9, 2.0])
    noise = next(draws)
    matrix = (vectors * spectrum) @ vectors.T + 3e-5 * (noise - noise.T)
    pairs = top_eigenvalues(matrix, k=5, tol=1e-3, seed=seed)
    assert pairs.converged
    assert pairs.values.tolist() == pytest.approx([2.0, 1.9, 1.8, 1.7, 1.5], rel=2e-3)
