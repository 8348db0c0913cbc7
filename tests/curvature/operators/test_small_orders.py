"""Matrices of small order: no estimate costs more products than the matrix has columns."""

import pytest
import torch
from cases import by_name
from torch import Tensor

import entropic_fast as ef
from entropic_fast.curvature import HessianOperator
from entropic_fast.ops.random_bits import streams as random


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random.normal((len(values), len(values)), seed))[0]
    return (q * values.double() @ q.T).to(values.dtype)


SPECTRA = {
    "flat": lambda n: torch.linspace(-1, 1, n).double(),
    "decaying": lambda n: 10 ** torch.linspace(-8, 1, n).double(),
    "low rank": lambda n: torch.cat([torch.zeros(n - n // 4), 1 + torch.arange(n // 4)]).double(),
    "one value": lambda n: 2 * torch.ones(n).double(),
    "float32": lambda n: torch.linspace(-1, 3, n),
}


class Counted:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        self.vectors = self.calls = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.vectors += vectors.shape[1] if vectors.ndim == 2 else 1
        self.calls += 1
        return self.matrix @ vectors


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 1), (100, 50), (100, 12), (100, 99), (100, 100), (37, 5), (300, 40)]
)
def test_products_are_no_more_than_the_order(n: int, k: int, spectrum: str, which: str):
    if spectrum == "low rank" and which in ("SA", "BE") and 8 < k < n / 2:
        pytest.skip("a block of 8 sees 8 copies of 0 before the other end is found")
    matrix = with_spectrum(SPECTRA[spectrum](n))
    operator = Counted(matrix)
    tol = 1e-4
    pairs = ef.top_eigenvalues(operator, k, tol=tol, which=which)
    assert pairs.converged and pairs.matvecs == operator.vectors <= n
    exact = torch.linalg.eigvalsh(matrix.double())
    wanted = {
        "LA": exact.flip(0)[:k],
        "SA": exact[:k],
        "LM": exact[exact.abs().argsort(descending=True)][:k].abs(),
        "BE": torch.cat([exact[: k // 2], exact[n - (k + 1) // 2 :]]).flip(0),
    }[which]
    got = pairs.values.abs() if which == "LM" else pairs.values
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4)
    true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    eps = torch.finfo(matrix.dtype).eps * float(exact.abs().max())
    assert torch.allclose(true, pairs.residuals, rtol=0.1, atol=50 * eps)
    gram = pairs.vectors.T @ pairs.vectors
    assert float((gram - torch.eye(k)).abs().max()) < 100 * torch.finfo(matrix.dtype).eps


def test_half_of_the_eigenvalues_are_exact_by_one_block():
    operator = Counted(with_spectrum(SPECTRA["flat"](100)))
    pairs = ef.top_eigenvalues(operator, 50)
    assert (operator.vectors, operator.calls) == (100, 1)
    assert float(pairs.residuals.max()) < 1e-13
    exact = torch.linalg.eigvalsh(operator.matrix).flip(0)[:50]
    assert torch.allclose(pairs.values, exact, atol=1e-14)


def test_the_matrix_is_not_formed_beyond_max_matvecs():
    operator = Counted(with_spectrum(SPECTRA["decaying"](100)))
    with pytest.warns(ef.NotConvergedWarning, match="after 60 products"):
        pairs = ef.top_eigenvalues(operator, 60, max_matvecs=60)
    assert operator.vectors == 60 and not pairs.converged


def test_hessians_are_formed_too():
    obj = by_name("tied weight").objective()
    operator = HessianOperator(obj)
    k = obj.num_params // 2 + 1
    pairs = ef.top_eigenvalues(operator, k)
    assert pairs.converged and pairs.matvecs == operator.products == obj.num_params


def test_half_of_the_fisher_eigenvalues_take_one_pass():
    obj = by_name("tied weight").objective(9)
    k = obj.num_params // 2
    pairs = ef.fisher_eigenvalues(obj, k)
    assert pairs.converged and pairs.matvecs == obj.num_params
    scores = ef.score_matrix(obj).double()
    exact = torch.linalg.eigvalsh(scores.T @ scores / len(scores)).flip(0)[:k]
    assert torch.allclose(pairs.values, exact.clamp(min=0), atol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("r", [0, 2])
def test_densities_of_small_orders_are_exact(spectrum: str, r: int):
    matrix = with_spectrum(SPECTRA[spectrum](100))
    along = random.normal((100, 2), 7).to(matrix) if r else None
    operator = Counted(matrix)
    density = ef.spectral_density(operator, orthogonal_to=along)
    assert operator.vectors == 100 and density.exact and density.converged
    z = torch.eye(100).double()
    if along is not None:
        z = torch.linalg.qr(along.double(), mode="complete")[0][:, 2:]
    values = torch.linalg.eigvalsh(z.T @ matrix.double() @ z)
    assert density.nodes.shape == density.weights.shape == (1, 100 - r) and density.size == 100 - r
    assert torch.allclose(density.nodes[0], values, atol=1e-5 if spectrum == "float32" else 1e-12)
    trace = density.trace(torch.exp)
    assert trace.value == pytest.approx(float(values.exp().sum()), rel=1e-5)
    assert (trace.std_error, trace.quadrature, trace.samples) == (0.0, 0.0, 100 - r)
    assert not density.std_error.any() and "exact" in repr(density)
    assert "the matrix was formed" in density._repr_html_()


def test_log_determinants_of_small_orders_are_exact():
    matrix = with_spectrum(torch.linspace(-0.2, 3, 90).double())
    expected = float((torch.linalg.eigvalsh(matrix).clamp(min=0) + 1e-5).log().sum())
    operator = Counted(matrix)
    found = ef.log_determinant(operator, delta=1e-5)
    assert found.value == pytest.approx(expected, abs=1e-9) and operator.vectors == 90
    assert (found.std_error, found.quadrature, found.converged) == (0.0, 0.0, True)


def test_few_probes_and_steps_stay_an_estimate():
    operator = Counted(with_spectrum(torch.linspace(0, 1, 200).double()))
    density = ef.spectral_density(
        operator, ef.DensitySettings(probes=4, steps=20, sigma=0.2, points=64)
    )
    assert operator.vectors == 80 and not density.exact


def test_formed_matrices_are_refused_like_others():
    with pytest.raises(ValueError, match="a symmetric one"):
        ef.spectral_density(random.normal((5, 5), 1))
    with pytest.raises(ValueError, match="finite products"):
        ef.spectral_density(torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match="a symmetric one"):
        ef.top_eigenvalues(random.normal((5, 5), 1), 4)
