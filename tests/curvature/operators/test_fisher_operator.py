"""Products with the Fisher matrix and its eigenpairs, against the matrix from explicit scores."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Case, by_name, plain_scores, relative_error
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from entropic_fast import NotConvergedWarning
from entropic_fast._utils import workspace as scratch
from entropic_fast._utils.results import Eigenpairs
from entropic_fast.curvature import (
    GGNOperator,
    LanczosSettings,
    fisher_trace,
    score_matrix,
    score_spectrum,
    top_eigenvalues,
)
from entropic_fast.curvature.estimators import _fisher_eigenvalues as fisher_operator
from entropic_fast.curvature.estimators._fisher_eigenvalues import fisher_eigenvalues
from entropic_fast.curvature.operators._fisher import FisherOperator
from entropic_fast.curvature.per_example._sampled_labels import with_sampled_labels
from entropic_fast.objective import NonFiniteLossError, Objective
from entropic_fast.ops.random_bits import streams as random

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def with_scores(scores: Tensor) -> Objective:
    """An objective whose score matrix is this one [E, P], at every point."""
    model = nn.Linear(scores.shape[1], 1, bias=False).to(scores.dtype)
    return Objective(model, lambda out, y: out[:, 0], (scores, scores[:, 0]))


def with_singular_values(values: Tensor, examples: int, parameters: int, seed: int = 0) -> Tensor:
    """Scores [E, P] whose Fisher matrix has these eigenvalues, and zeros."""
    left = torch.linalg.qr(random.normal((examples, len(values)), seed))[0]
    right = torch.linalg.qr(random.normal((parameters, len(values)), seed + 1))[0]
    return left * (examples * values).sqrt() @ right.T


def require_eigenpairs(pairs: Eigenpairs, scores: Tensor, k: int, tol: float = 1e-3) -> None:
    """Shapes, orthonormal vectors, true residuals, and the right eigenvalues."""
    scores = scores.double()
    parameters = scores.shape[1]
    assert pairs.values.shape == pairs.residuals.shape == (k,)
    assert pairs.vectors.shape == (parameters, k) and pairs.vectors.dtype == torch.float64
    eye = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, eye, atol=1e-12)
    matrix = scores.T @ scores / len(scores)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:k].clamp(min=0)
    rounding = 1e-13 * float(exact[0])
    true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals, rtol=1e-3, atol=rounding)
    assert pairs.converged and bool((true <= tol * pairs.values + 10 * rounding).all())
    assert torch.allclose(pairs.values, exact, rtol=tol, atol=rounding)


# -- products ------------------------------------------------------------------------------


@both_dtypes
@all_cases
def test_products_are_those_of_explicit_scores(case: Case, dtype: torch.dtype):
    scores, obj = plain_scores(case), case.objective(dtype=dtype)
    product = FisherOperator(obj)
    got = product @ torch.eye(obj.num_params, dtype=dtype)
    assert got.dtype == product.dtype == dtype and product.shape == (obj.num_params,) * 2
    assert relative_error(got, scores.T @ scores / len(scores)) < TOLERANCE[dtype]


def test_vectors_blocks_and_empty_blocks():
    obj = by_name("layer norm").objective(9)
    product, block = FisherOperator(obj), random.normal((obj.num_params, 5), 0)
    columns = torch.stack([product @ column for column in block.T], 1)
    assert torch.allclose(product @ block, columns, atol=1e-14)
    assert torch.allclose(product @ block.T.contiguous().T, columns, atol=1e-14)
    assert (product @ block[:, :0]).shape == (obj.num_params, 0)
    assert (product.passes, product.products) == (7, 15)
    assert repr(product) == f"FisherOperator(P={obj.num_params}, E=9)"


@pytest.mark.parametrize("size", [1, 4, 33])
def test_max_examples_takes_the_first(size: int):
    case = by_name("tied weight")
    scores = plain_scores(case, 33)
    obj = case.objective(33, batch_size=size)
    v = random.normal((obj.num_params,), 1)
    for count in (1, 7, 33):
        expected = scores[:count].T @ (scores[:count] @ v) / count
        assert torch.allclose(FisherOperator(obj, max_examples=count) @ v, expected, atol=1e-14)


def test_the_point_is_kept():
    obj = by_name("tied weight").objective()
    theta = obj.parameters_vector() * 1.3 - 0.1
    scores, v = score_matrix(obj, theta), random.normal((obj.num_params,), 1)
    product = FisherOperator(obj, theta)
    theta.zero_()
    assert torch.allclose(product @ v, scores.T @ (scores @ v) / len(scores), atol=1e-14)


def test_many_slices_add_up(monkeypatch: pytest.MonkeyPatch):
    obj = by_name("layer norm").objective(9)
    block = random.normal((obj.num_params, 3), 0)
    whole = FisherOperator(obj) @ block
    for size in (1, 500, 2000):
        monkeypatch.setattr(scratch, "CPU", scratch.CPU._replace(products=size))
        assert torch.allclose(FisherOperator(obj) @ block, whole, atol=1e-14)


def test_float64_vectors_on_float32_scores():
    obj = by_name("attention").objective(dtype=torch.float32)
    scores = score_matrix(obj).double()
    v = random.normal((obj.num_params,), 1)
    got = FisherOperator(obj, dtype=torch.float64) @ v
    assert relative_error(got, scores.T @ (scores @ v) / len(scores)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_float32_products(dtype: torch.dtype):
    obj = by_name("layer norm").objective(dtype=dtype)
    v = random.normal((obj.num_params,), 1, dtype=torch.float32)
    got = FisherOperator(obj) @ v
    assert got.dtype == torch.float32
    exact = FisherOperator(obj.cast(torch.float64)) @ v.double()
    assert relative_error(got, exact) < 8 * torch.finfo(dtype).eps
    assert fisher_eigenvalues(obj, 2).converged


def test_the_operator_protocol():
    obj = by_name("tied weight").objective(20)
    product = FisherOperator(obj)
    exact = score_spectrum(obj)
    pairs = top_eigenvalues(product, 3, tol=1e-8)
    assert pairs.converged and torch.allclose(pairs.values, exact[:3], rtol=1e-10)
    found = eigsh(product.to_scipy(), k=3, v0=np.ones(obj.num_params), return_eigenvectors=False)
    assert np.allclose(np.sort(found)[::-1], exact[:3].numpy(), rtol=1e-8)


def test_sampled_labels_give_the_gauss_newton_matrix():
    """Both eigenvalues and products; the given labels give another matrix."""
    obj = by_name("raw parameter").objective(8)
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    exact = GGNOperator(obj) @ eye
    true = FisherOperator(with_sampled_labels(obj, draws=2000)) @ eye
    assert relative_error(true, exact) < 0.05 < relative_error(FisherOperator(obj) @ eye, exact)


# -- eigenpairs ----------------------------------------------------------------------------


@both_dtypes
@all_cases
def test_eigenpairs_are_those_of_explicit_scores(case: Case, dtype: torch.dtype):
    obj = case.objective(9, dtype=dtype)
    for k in (1, 4):
        require_eigenpairs(fisher_eigenvalues(obj, k), score_matrix(obj), k)


@pytest.mark.parametrize(("examples", "parameters"), [(40, 150), (150, 40), (60, 60)])
@pytest.mark.parametrize(("k", "block"), [(1, 1), (1, 6), (5, 5), (5, None), (20, None)])
def test_random_scores(examples: int, parameters: int, k: int, block: int | None):
    scores = random.normal((examples, parameters), k)
    pairs = fisher_eigenvalues(
        with_scores(scores), k, max_passes=400, lanczos=LanczosSettings(tol=1e-6, block=block)
    )
    require_eigenpairs(pairs, scores, k, 1e-6)


@pytest.mark.parametrize(
    ("examples", "parameters", "k"),
    [(1, 1, 1), (1, 7, 1), (1, 7, 7), (3, 20, 5), (3, 20, 20), (20, 3, 3), (30, 4, 1), (5, 5, 5)],
)
def test_few_examples_and_few_parameters(examples: int, parameters: int, k: int):
    """k up to P, and above the number of examples."""
    scores = random.normal((examples, parameters), 3)
    require_eigenpairs(fisher_eigenvalues(with_scores(scores), k), scores, k)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_eigenvalues_beyond_the_rank_are_zero(rank: int):
    scores = with_singular_values(torch.linspace(1, 2, rank).double(), 30, 50)
    pairs = fisher_eigenvalues(with_scores(scores), 9)
    require_eigenpairs(pairs, scores, 9)
    assert float(pairs.values[rank:].max()) < 1e-14


@pytest.mark.parametrize("k", [1, 4, 6])
def test_scores_of_zero(k: int):
    pairs = fisher_eigenvalues(with_scores(torch.zeros(5, 6, dtype=torch.float64)), k)
    assert pairs.converged and not pairs.values.any() and not pairs.residuals.any()
    eye = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, eye, atol=1e-13)


@pytest.mark.parametrize("copies", [2, 5, 9])
def test_every_copy_of_a_multiple_eigenvalue_is_found(copies: int):
    values = torch.tensor([3.0] + [2.0] * copies + [1.0] * 4 + [0.1] * 10).double()
    scores = with_singular_values(values, 40, 60)
    for k in (2, copies + 1, copies + 3):
        for block in (k, None):
            pairs = fisher_eigenvalues(
                with_scores(scores), k, lanczos=LanczosSettings(tol=1e-9, block=block)
            )
            require_eigenpairs(pairs, scores, k, 1e-9)


def test_a_spectrum_over_ten_decades_comes_out_of_float32_scores():
    """A float32 basis would end at 1e-7 of the largest."""
    values = torch.logspace(0, -10, 12).double()
    scores = with_singular_values(values, 12, 80)
    exact = torch.linalg.svdvals(scores.float().double()).square() / 12
    pairs = fisher_eigenvalues(with_scores(scores.float()), 10)
    assert pairs.converged and torch.allclose(pairs.values, exact[:10], rtol=1e-5)


def test_clustered_eigenvalues_need_restarts_and_get_them():
    values = torch.cat([torch.linspace(0, 1, 150), torch.tensor([1.02, 1.04, 1.1])]).double()
    obj = with_scores(scores := with_singular_values(values, 160, 200))
    columns = fisher_operator.WORKSPACE * 3 + 3 + 3
    least = 4 * (columns * 8 * 200 + scratch.CPU.products) // 3
    for budget in (least + 1, least + 60_000, None):
        pairs = fisher_eigenvalues(
            obj,
            3,
            max_passes=2000,
            memory_budget=budget,
            lanczos=LanczosSettings(tol=1e-7, block=3),
        )
        require_eigenpairs(pairs, scores, 3, 1e-7)


def test_wider_blocks_take_fewer_passes():
    values = torch.logspace(0, -3, 100).double()
    obj = with_scores(with_singular_values(values, 120, 150))
    passes = []
    for block in (5, 10, 30):
        pairs = fisher_eigenvalues(obj, 5, max_passes=200, lanczos=LanczosSettings(block=block))
        assert pairs.converged
        passes.append((pairs.matvecs - 5) // block + 1)
    assert passes[0] > passes[1] > passes[2]


@pytest.mark.parametrize("most", [2, 3, 7])
def test_max_passes_is_kept_and_said_to_be_too_few(most: int, monkeypatch: pytest.MonkeyPatch):
    operators = []
    original = FisherOperator.__init__

    def init(self, *args, **kwargs):
        operators.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(FisherOperator, "__init__", init)
    values = torch.linspace(0.9, 1, 100).double()
    scores = with_singular_values(values, 110, 120)
    with pytest.warns(NotConvergedWarning, match=f"after {most} passes.*raise max_passes"):
        pairs = fisher_eigenvalues(
            with_scores(scores), 2, max_passes=most, lanczos=LanczosSettings(tol=1e-12)
        )
    assert operators[0].passes == most and operators[0].products == pairs.matvecs
    assert not pairs.converged
    matrix = scores.T @ scores / 110
    true = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals, rtol=1e-6)


def test_seeds_change_the_start_and_not_the_answer():
    obj = by_name("transformer layer").objective(30)
    a, b = (
        fisher_eigenvalues(obj, 3, seed=seed, lanczos=LanczosSettings(tol=1e-9)) for seed in (0, 1)
    )
    again = fisher_eigenvalues(obj, 3, seed=0, lanczos=LanczosSettings(tol=1e-9))
    assert torch.equal(a.vectors, again.vectors) and not torch.equal(a.vectors, b.vectors)
    assert torch.allclose(a.values, b.values, rtol=1e-12)


def test_points_counts_and_the_trace():
    obj = by_name("tied weight").objective(20)
    theta = obj.parameters_vector() * 1.3 - 0.1
    pairs = fisher_eigenvalues(obj, 4, theta, max_examples=11)
    assert torch.allclose(pairs.values, score_spectrum(obj, theta, 11)[:4], rtol=1e-5)
    whole = fisher_eigenvalues(obj, obj.num_params)
    assert float(whole.values.sum()) == pytest.approx(fisher_trace(obj).value, rel=1e-10)


# -- memory and bad input ------------------------------------------------------------------


PEAK = """
import gc, sys, torch
from torch import nn
from entropic_fast.objective import Objective
from entropic_fast.curvature import LanczosSettings, fisher_eigenvalues

def status(key):
    line = [l for l in open("/proc/self/status") if l.startswith(key)][0]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 10))
obj = Objective(model, "cross_entropy", (torch.randn(64, 64), torch.randint(0, 10, (64,))))
fisher_eigenvalues(obj, 1, max_examples=2, memory_budget=2**27, max_passes=2)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
budget = int(sys.argv[1])
pairs = fisher_eigenvalues(
    obj, 2, lanczos=LanczosSettings(tol=1e-7, block=3), memory_budget=budget, max_passes=11
)
print(pairs.matvecs)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_near_the_budget():
    """P is 75,010: a column takes 0.57 MiB, so 25 fit beside the workspace, and are restarted."""
    budget = 32 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(budget)], capture_output=True, text=True, check=True
    )
    products, grown = map(int, run.stdout.split())
    assert products > 25 and grown < 1.15 * budget


def test_a_budget_too_small_is_refused_with_what_is_needed():
    obj = by_name("layer norm").objective()
    with pytest.raises(ValueError, match=r"memory_budget: expected at least .* narrower block"):
        fisher_eigenvalues(obj, 3, memory_budget=100_000)
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        FisherOperator(obj, memory_budget=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer of at least 1"),
        ({"k": 18}, "k: expected at most the 17 parameters"),
        ({"tol": 0.0}, "tol"),
        ({"block": 1}, "block: expected at least k = 2"),
        ({"block": 2.5}, "block: expected an integer"),
        ({"max_passes": 1}, "max_passes: expected an integer of at least 2"),
        ({"max_examples": 8}, "max_examples: expected at most the 7"),
        ({"theta": torch.ones(3)}, "theta"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"obj": nn.Linear(1, 1)}, "obj: expected an Objective"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    obj = by_name("raw parameter").objective()
    with pytest.raises(ValueError, match=message):
        lanczos = {name: arguments[name] for name in arguments.keys() & {"tol", "block"}}
        others = {name: arguments[name] for name in arguments.keys() - lanczos.keys()}
        fisher_eigenvalues(**{"obj": obj, "k": 2, "lanczos": LanczosSettings(**lanczos), **others})


def test_bad_vectors_are_refused():
    product = FisherOperator(by_name("raw parameter").objective())
    for bad, message in [
        (torch.ones(16).double(), r"expected a tensor of shape \[17\] or \[17, K\]"),
        (torch.ones(17), r"vectors: expected torch\.float64"),
        (torch.full((17,), float("nan")).double(), "vectors: expected finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            product @ bad
    with pytest.raises(ValueError, match="dtype: expected"):
        FisherOperator(product.obj, dtype=torch.float16)


def test_scores_that_do_not_exist_are_refused():
    x = torch.ones(6, 4)
    x[4, 2] = float("nan")
    y = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(NonFiniteLossError, match="example 4"):
        fisher_eigenvalues(Objective(nn.Linear(4, 3), "cross_entropy", (x, y)), 1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    batch = Objective(model, "cross_entropy", (torch.randn(6, 4), y), norm="batch")
    with pytest.raises(ValueError, match="depend on that example alone"):
        FisherOperator(batch)
