"""The diagonal: exact cases, no bias, errors entry by entry, bounded memory."""

import gc

import numpy as np
import pytest
import torch
from cases import by_name, difference_hessian
from known_spectra import spiked, with_spectrum
from torch import nn

from entropic_fast.curvature import (
    HessianOperator,
    hessian_diagonal,
    hessian_trace,
    operator_diagonal,
    top_eigenvalues,
)
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits import streams as random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [1, 2, 9])
def test_signs_are_exact_on_a_diagonal_matrix(dtype: torch.dtype, probes: int):
    diagonal = torch.arange(-3.0, 8.0, dtype=dtype)
    found = operator_diagonal(torch.diag(diagonal), probes)
    assert torch.equal(found.value, diagonal.double())
    assert found.value.dtype == found.std_error.dtype == torch.float64
    assert bool(found.std_error.isnan().all()) if probes == 1 else not found.std_error.any()
    assert found.samples == probes


def test_it_is_the_mean_and_the_error_of_the_samples():
    matrix, _ = with_spectrum(spiked(20))
    for probes in (3, 8, 19):
        signs = torch.stack([random.rademacher((20,), 5, i) for i in range(probes)], 1)
        samples = signs * (matrix @ signs)
        found = operator_diagonal(matrix, probes, seed=5)
        assert torch.allclose(found.value, samples.mean(1), rtol=1e-12)
        assert torch.allclose(found.std_error, samples.std(1) / probes**0.5, rtol=1e-10)


def test_the_standard_error_has_its_closed_form():
    matrix, _ = with_spectrum(spiked(20))
    off = matrix - torch.diag(matrix.diagonal())
    found = operator_diagonal(matrix, 2000)
    expected = (off.square().sum(1) / 2000).sqrt()
    assert torch.allclose(found.std_error, expected, rtol=0.15)
    z = (found.value - matrix.diagonal()) / found.std_error
    assert float(z.abs().max()) < 4


@pytest.mark.parametrize("deflated", [False, True])
def test_there_is_no_bias_and_errors_cover(deflated: bool):
    """200 runs: means within 4.5 deviations in all entries, 95 % of entries within 2 errors."""
    matrix, _ = with_spectrum(spiked(20), seed=3)
    other = torch.linalg.qr(random.normal((20, 4), 9))[0] if deflated else None
    runs = [operator_diagonal(matrix, 32, seed, deflate=other) for seed in range(200)]
    values = torch.stack([r.value for r in runs])
    gap = (values.mean(0) - matrix.diagonal()) / (values.std(0) / 200**0.5)
    assert float(gap.abs().max()) < 4.5
    errors = torch.stack([r.std_error for r in runs])
    covered = float(((values - matrix.diagonal()).abs() <= 2 * errors).double().mean())
    assert 0.92 < covered < 0.97


def test_known_eigenvectors_leave_the_error_of_the_rest():
    matrix, vectors = with_spectrum(spiked(50))
    plain = operator_diagonal(matrix, 20)
    deflated = operator_diagonal(matrix, 20, deflate=vectors[:, :4])
    assert float(deflated.std_error.norm()) < float(plain.std_error.norm()) / 20
    gap = (deflated.value - matrix.diagonal()) / deflated.std_error
    assert float(gap.abs().max()) < 6  # Student with 19 degrees of freedom, 50 entries
    whole = operator_diagonal(matrix, 2, deflate=vectors)
    assert torch.allclose(whole.value, matrix.diagonal(), atol=1e-12)


def test_hessian_of_a_network_and_its_trace():
    case = by_name("group norm")
    obj, truth = case.objective(), difference_hessian(case).diagonal()
    found = hessian_diagonal(obj, probes=300)
    assert float(((found.value - truth).abs() - 1e-7).div(found.std_error + 1e-12).max()) < 4.5
    trace = hessian_trace(obj, probes=300)
    assert float(found.value.sum()) == pytest.approx(trace.value, rel=1e-10)
    pairs = top_eigenvalues(HessianOperator(obj), k=3)
    deflated = hessian_diagonal(obj, probes=30, deflate=pairs)
    assert float(((deflated.value - truth).abs() - 1e-7).div(deflated.std_error).max()) < 6


def test_least_squares_has_its_closed_form():
    """Independent features of one example each: the Hessian 2 / N X^T X is diagonal."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    obj = Objective(nn.Linear(3, 1, bias=False).double(), "mse", (x, torch.zeros(3, 1).double()))
    found = hessian_diagonal(obj, probes=2)
    assert torch.allclose(found.value, 2 / 3 * torch.tensor([1.0, 4.0, 9.0]).double())


def test_one_parameter():
    assert operator_diagonal(torch.tensor([[2.5]]), 1).value.tolist() == [2.5]


def test_probes_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch):
    from entropic_fast.curvature.estimators import _probes as probes

    matrix, _ = with_spectrum(spiked(20))
    expected = operator_diagonal(matrix, 13)
    for block in (1, 3):
        monkeypatch.setattr(probes, "BLOCK", block)
        got = operator_diagonal(matrix, 13)
        assert torch.allclose(got.value, expected.value, rtol=1e-12)
        assert torch.allclose(got.std_error, expected.std_error, rtol=1e-10)


def test_memory_does_not_grow_with_the_probes():
    """As many numbers are alive in the last product of 160 probes as in that of 16."""
    size = 3000

    class Doubling:
        shape, dtype = (size, size), torch.float32

        def __init__(self) -> None:
            self.alive: list[int] = []

        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
            self.alive.append(sum(t.numel() for t in tensors if t.numel() >= size))
            return vectors * 2

    few, many = Doubling(), Doubling()
    operator_diagonal(few, 16)
    operator_diagonal(many, 160)
    assert len(many.alive) == 20
    assert max(many.alive) == max(few.alive) < 40 * size + few.alive[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes: expected an integer of at least 1"),
        ({"deflate": torch.ones(4, 1)}, r"deflate: expected Eigenpairs or a matrix of shape \[3"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        operator_diagonal(torch.eye(3), **arguments)
    with pytest.raises(ValueError, match="square"):
        operator_diagonal(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite products"):
        operator_diagonal(torch.full((2, 2), np.nan))
