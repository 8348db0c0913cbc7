"""Block Lanczos: multiplicities, residuals, warm starts, both ends, and no waiting."""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import entropic_fast as ef
from entropic_fast.curvature import DensitySettings, spectral_density, top_eigenvalues
from entropic_fast.curvature.estimators import _block_lanczos as krylov
from entropic_fast.ops.random_bits import streams as random


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random.normal((n, n), seed))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    return q * values @ q.T


class Counted:
    """A dense matrix that counts the vectors it multiplies."""

    def __init__(self, matrix: Tensor, on_product: Callable[[], None] = lambda: None) -> None:
        self.matrix, self.on_product, self.widths = matrix, on_product, []
        self.shape, self.dtype = matrix.shape, matrix.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.widths.append(vectors.shape[1])
        self.on_product()
        return self.matrix @ vectors


# -- multiplicities and ends ---------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 3, 8])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_every_copy_of_a_multiple_eigenvalue_is_found(copies: int, which: str):
    sign = -1.0 if which == "SA" else 1.0
    values = sign * torch.cat([torch.full((copies,), 3.0), torch.linspace(-1, 2, 150)]).double()
    pairs = top_eigenvalues(with_spectrum(values), copies, tol=1e-8, which=which)
    assert pairs.converged and torch.allclose(pairs.values, values[:copies], atol=1e-8)


def test_a_narrow_block_sees_as_many_copies_as_it_is_wide():
    values = torch.cat([torch.full((4,), 3.0), torch.linspace(-1, 2, 150)]).double()
    for block in (1, 2, 3):
        found = top_eigenvalues(with_spectrum(values), block + 1, tol=0.05, block=block).values
        assert int((found > 2.5).sum()) == block


def test_the_hessian_of_least_squares_has_as_many_copies_as_outputs():
    """(2 / N) X^T X for each of C outputs, so that every eigenvalue comes C times."""
    x = random.normal((50, 40), 0)
    matrix = torch.kron(torch.eye(6).double(), 2 / 50 * x.T @ x)
    pairs = top_eigenvalues(matrix, 7, tol=1e-8)
    exact = torch.linalg.eigvalsh(2 / 50 * x.T @ x).flip(0)
    assert torch.allclose(pairs.values, exact[:2].repeat_interleave(6)[:7], rtol=1e-8)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_both_ends_share_k(k: int):
    values = torch.cat([torch.linspace(-1, 1, 60), torch.tensor([-3.0, -2.5, -2.0, 4.0, 5.0, 6.0])])
    pairs = top_eigenvalues(with_spectrum(values.double()), k, which="BE", tol=1e-8)
    expected = [6.0, 5.0, 4.0, 1.0][: (k + 1) // 2] + [-2.0, -2.5, -3.0][3 - k // 2 :]
    assert pairs.converged
    assert pairs.values.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 17])
@pytest.mark.parametrize("block", [None, 1, 2, 20])
def test_all_eigenvalues_of_small_matrices(n: int, which: str, block: int | None):
    matrix = with_spectrum(random.normal((n,), n).sort().values, n)
    pairs = top_eigenvalues(matrix, n, which=which, block=block)
    exact = torch.linalg.eigvalsh(matrix)
    assert pairs.converged and pairs.matvecs <= 2 * n
    assert torch.allclose(pairs.values.sort().values, exact, atol=1e-12)
    assert torch.allclose(
        matrix @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-11 * max(1, n)
    )


@pytest.mark.parametrize("block", [1, 2, 4, 7])
@pytest.mark.parametrize("extra", [8, 40])
def test_blocks_of_any_width_reach_a_cluster(
    block: int, extra: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(krylov, "EXTRA_COLUMNS", extra)
    monkeypatch.setattr(krylov, "COMPLETE", 0)
    monkeypatch.setattr(krylov, "DEPTH", 1)
    values = torch.cat([torch.linspace(-1, 1, 150), torch.tensor([1.06, 1.08, 1.1, 1.2])]).double()
    pairs = top_eigenvalues(with_spectrum(values), 4, tol=1e-7, block=block, max_matvecs=5000)
    assert pairs.converged and torch.allclose(pairs.values, values.flip(0)[:4], atol=1e-9)


# -- residuals -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [6, 40])
@pytest.mark.parametrize(("k", "block"), [(1, 1), (5, 1), (5, None), (5, 8)])
def test_residuals_without_a_product_more_are_true(
    dtype: torch.dtype, extra: int, k: int, block: int | None, monkeypatch: pytest.MonkeyPatch
):
    """With and without restarts; none of the products was spent on them."""
    monkeypatch.setattr(krylov, "EXTRA_COLUMNS", extra)
    monkeypatch.setattr(krylov, "COMPLETE", 0)
    monkeypatch.setattr(krylov, "DEPTH", 1)
    matrix = with_spectrum(torch.linspace(0, 1, 250).double() ** 3).to(dtype)
    operator = Counted(matrix)
    monkeypatch.setattr(krylov, "_verified", None)  # calling it would fail
    pairs = top_eigenvalues(operator, k, block=block, max_matvecs=3000)
    assert pairs.converged and pairs.matvecs == sum(operator.widths)
    exact, vectors = matrix.double(), pairs.vectors.double()
    true = (exact @ vectors - vectors * pairs.values.double()).norm(dim=0)
    assert torch.allclose(true, pairs.residuals.double(), rtol=1e-3, atol=2e-7)
    spread = vectors.T @ vectors - torch.eye(k).double()
    assert float(spread.abs().max()) < 20 * torch.finfo(dtype).eps


def test_residuals_near_rounding_are_computed():
    operator = Counted(with_spectrum(torch.linspace(-1, 1, 80).double()).float())
    pairs = top_eigenvalues(operator, 3, tol=1e-5, block=1)
    assert operator.widths[-1] == 3 and pairs.matvecs == sum(operator.widths)
    true = (operator.matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals, rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("extra", [6, 40])
def test_products_with_noise_have_honest_residuals(extra: int, monkeypatch: pytest.MonkeyPatch):
    """An operator symmetric but for 1e-4 cannot reach 1e-6, and says so."""
    monkeypatch.setattr(krylov, "EXTRA_COLUMNS", extra)
    monkeypatch.setattr(krylov, "COMPLETE", 0)
    matrix = with_spectrum(torch.linspace(0, 1, 120).double() ** 4)
    noise = random.normal((120, 120), 3)
    matrix = matrix + 1e-4 * (noise - noise.T) / noise.norm() * 120**0.5
    for tol in (1e-2, 1e-6):
        unmet = pytest.warns(ef.NotConvergedWarning, match="operator's own rounding: use float64")
        with unmet if tol == 1e-6 else contextlib.nullcontext():
            pairs = top_eigenvalues(matrix, 2, tol=tol, max_matvecs=200)
        true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        assert torch.allclose(true, pairs.residuals, rtol=0.05)
        assert pairs.converged == (tol == 1e-2)


@pytest.mark.parametrize(("k", "most", "block"), [(1, 7, 1), (3, 3, None), (3, 10, None)])
def test_max_matvecs_is_kept(k: int, most: int, block: int | None):
    operator = Counted(with_spectrum(torch.linspace(0, 1, 200).double()))
    with pytest.warns(ef.NotConvergedWarning, match="raise max_matvecs"):
        pairs = top_eigenvalues(operator, k, tol=1e-9, max_matvecs=most, block=block)
    assert pairs.matvecs == sum(operator.widths) == most and not pairs.converged


# -- warm starts ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pairs_cost_one_block_to_confirm(k: int, dtype: torch.dtype):
    matrix = with_spectrum(torch.linspace(0, 1, 150).double() ** 2).to(dtype)
    known = top_eigenvalues(matrix, k, tol=1e-4)
    for start in (known, known.vectors):
        again = top_eigenvalues(matrix, k, v0=start)
        assert again.converged and again.matvecs == k
        assert torch.allclose(again.values, known.values, rtol=1e-6)


def test_more_vectors_than_the_block_are_added_up():
    matrix = with_spectrum(torch.linspace(0, 1, 150).double() ** 2)
    known = top_eigenvalues(matrix, 4, tol=1e-6)
    operator = Counted(matrix)
    pairs = top_eigenvalues(operator, 4, v0=known, block=1)
    assert set(operator.widths) == {1}
    assert pairs.converged and torch.allclose(pairs.values, known.values, rtol=1e-5)
    assert pairs.matvecs < top_eigenvalues(matrix, 4, block=1).matvecs / 2


def test_a_block_is_filled_up_with_random_vectors():
    """One known vector of the wrong eigenvalue is accepted alone, and not with company."""
    q = rotation(60)
    matrix = q * torch.linspace(0, 1, 60).double() @ q.T
    wrong = q[:, 30]
    assert float(top_eigenvalues(matrix, v0=wrong).values[0]) == pytest.approx(30 / 59)
    operator = Counted(matrix)
    pairs = top_eigenvalues(operator, v0=wrong, block=2)
    assert operator.widths[0] == 2 and float(pairs.values[0]) == pytest.approx(1, abs=1e-5)


def test_dependent_start_vectors_are_no_harm():
    matrix = with_spectrum(torch.linspace(0, 1, 60).double())
    v = random.normal((60,), 1)
    start = torch.stack([v, 2 * v, torch.zeros(60).double(), -v], 1)
    pairs = top_eigenvalues(matrix, 2, tol=1e-6, v0=start)
    assert pairs.converged and float(pairs.values[0]) == pytest.approx(1)


def power_iteration(matrix: Tensor, v: Tensor, tol: float) -> tuple[int, Tensor]:
    """Products until the relative residual is under tol, and the vector."""
    products = 0
    while True:
        following = matrix @ v
        products += 1
        value = v @ following
        if float((following - value * v).norm()) <= tol * abs(float(value)):
            return products, v
        v = following / following.norm()


def path_of_matrices() -> list[Tensor]:
    """Spectra like a trained network's, rotating and rising along a path of 33 points."""
    n = 200
    values = torch.cat([torch.linspace(1, 0.5, 8), torch.logspace(-0.5, -4, n - 8)]).double()
    generator = random.normal((n, n), 1)
    generator = (generator - generator.T) / n**0.5
    path = []
    for s in torch.linspace(0, 1, 33).tolist():
        q = torch.matrix_exp(3.0 * s * generator)
        path.append((1 + math.sin(math.pi * s)) * (q * values) @ q.T)
    return path


def test_a_warm_start_along_a_path_halves_products():
    path = path_of_matrices()
    v = random.normal((200,), 0)
    warm = cold = power = 0
    pairs = None
    for matrix in path:
        pairs = top_eigenvalues(matrix, v0=pairs)
        exact = float(torch.linalg.eigvalsh(matrix)[-1])
        assert pairs.converged and float(pairs.values[0]) == pytest.approx(exact, rel=1e-4)
        warm += pairs.matvecs
        cold += top_eigenvalues(matrix).matvecs
        products, v = power_iteration(matrix, v / v.norm(), 1e-3)
        power += products
    assert warm < cold / 2 and warm < 0.6 * power
    assert warm <= 8 * len(path)


# -- nothing waits -------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes operations that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex")

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.events.append("wait")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Looks at every third step, as on a device; copies to the host are noted."""
    events: list[str] = []
    monkeypatch.setattr(krylov, "stride_of", lambda device: 3)
    for name in ("cpu", "tolist", "numpy"):
        original = getattr(Tensor, name)

        def noted(self, *args, original=original):
            events.append("wait")
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, noted)
    return events


@pytest.mark.parametrize(("k", "block"), [(1, 1), (2, 2), (4, None)])
def test_steps_between_looks_wait_for_nothing(events: list[str], k: int, block: int | None):
    matrix = with_spectrum(torch.linspace(0, 1, 300).double())
    operator = Counted(matrix, lambda: events.append("product"))
    with Waits(events):
        pairs = top_eigenvalues(operator, k, tol=1e-4, block=block)
    assert pairs.converged
    # Products with no waiting between them, from the third on and far from convergence.
    runs = " ".join(events).split("wait")
    lengths = [run.count("product") for run in runs if "product" in run]
    assert lengths[:2] == [1, 1] and max(lengths) == 3
    assert lengths[2:5] == [3, 3, 3]


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (torch.linspace(0, 1, 150).double() ** 2, 1),
        (torch.linspace(-1, 1, 150).double(), 3),
        (torch.cat([torch.zeros(60), torch.tensor([1.0, 2.0, 3.0])]).double(), 2),
        (torch.cat([torch.zeros(60), torch.tensor([1.0, 2.0, 3.0])]).double(), 7),
        (torch.ones(40).double(), 5),
        (torch.zeros(40).double(), 3),
        (torch.linspace(0, 1, 11).double(), 11),
        (torch.tensor([2.0]).double(), 1),
    ],
)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("block", [1, 2, None])
def test_results_do_not_depend_on_when_they_are_looked_at(
    values: Tensor, k: int, which: str, block: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Spaces that are exhausted between two looks included."""
    matrix = with_spectrum(values)
    each = top_eigenvalues(matrix, k, tol=1e-6, which=which, block=block)
    monkeypatch.setattr(krylov, "stride_of", lambda device: 3)
    late = top_eigenvalues(matrix, k, tol=1e-6, which=which, block=block)
    assert each.converged and late.converged
    assert torch.allclose(late.values, each.values, atol=1e-9)


def test_late_looks_refuse_what_early_ones_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(krylov, "stride_of", lambda device: 3)
    with pytest.raises(ValueError, match="a symmetric one"):
        top_eigenvalues(random.normal((40, 40), 0), 2)

    class Fails(Counted):
        def __matmul__(self, vectors: Tensor) -> Tensor:
            product = super().__matmul__(vectors)
            return product * math.nan if len(self.widths) >= 4 else product

    with pytest.raises(ValueError, match="finite products"):
        top_eigenvalues(Fails(with_spectrum(torch.linspace(0, 1, 90).double())), tol=1e-8)


class Near0:
    """A matrix known to be symmetric, whose products are mostly rounding."""

    symmetric = True

    def __init__(self, size: int = 60) -> None:
        exact = with_spectrum(torch.linspace(0, 1, size).double())
        self.matrix = exact + 0.3 * random.normal((size, size), 4) / size**0.5
        self.shape, self.dtype = self.matrix.shape, self.matrix.dtype

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.matrix @ vectors


@pytest.mark.parametrize("k", [1, 3])
def test_rounding_of_an_operator_known_to_be_symmetric_is_in_its_residuals(k: int):
    operator = Near0()
    with pytest.raises(ValueError, match="a symmetric one"):
        top_eigenvalues(operator.matrix, k)
    with pytest.warns(ef.NotConvergedWarning, match="operator's own rounding"):
        pairs = top_eigenvalues(operator, k)
    true = (operator @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals, rtol=0.05)
    assert not pairs.converged and pairs.matvecs < 100  # it sees that more would not help
    with pytest.warns(ef.NotConvergedWarning, match="spectral_density"):
        density = spectral_density(operator, DensitySettings(probes=2, steps=8))
    assert bool(torch.isfinite(density.density).all())


def test_a_hessian_of_nothing_but_rounding_gives_pairs_that_say_so():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([60.0, 0.0, 0.0]))  # certain: softmax' Hessian is 0
    obj = ef.Objective(net, "cross_entropy", (torch.randn(40, 8), torch.zeros(40).long()))
    with pytest.warns(ef.NotConvergedWarning, match="operator's own rounding"):
        pairs = top_eigenvalues(ef.HessianOperator(obj), 2)
    assert bool(torch.isfinite(pairs.values).all()) and float(pairs.residuals.max()) < 1e-6
