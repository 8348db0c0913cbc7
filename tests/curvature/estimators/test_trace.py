"""Hutchinson's estimator: exact cases, calibrated errors, probes that depend on the seed only."""

import math

import numpy as np
import pytest
import torch
from cases import by_name, difference_hessian
from torch import Tensor

from entropic_fast import Estimate, NotConvergedWarning
from entropic_fast.curvature import HessianOperator, hessian_trace, operator_trace
from entropic_fast.curvature.estimators._probes import precise
from entropic_fast.ops.random_bits import streams as random


def symmetric(n: int, seed: int = 0) -> Tensor:
    matrix = random.normal((n, n), seed)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [1, 2, 9])
def test_signs_are_exact_on_a_diagonal_matrix(dtype: torch.dtype, probes: int):
    diagonal = torch.arange(-3.0, 8.0, dtype=dtype)
    estimate = operator_trace(torch.diag(diagonal), probes=probes)
    assert estimate.value == float(diagonal.sum())
    assert estimate.samples == probes
    assert math.isnan(estimate.std_error) if probes == 1 else estimate.std_error == 0


def test_one_parameter_is_exact():
    assert operator_trace(torch.tensor([[2.5]]), probes=1).value == 2.5


def test_every_sign_vector_once_averages_to_the_trace():
    """The estimator is unbiased: the mean over all 2^n sign vectors is the trace."""
    matrix = symmetric(4)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    mean = torch.einsum("vi,ij,vj->v", signs, matrix, signs).mean()
    assert float(mean) == pytest.approx(float(matrix.trace()))
    estimate = operator_trace(matrix, probes=4000)
    assert abs(estimate.value - float(matrix.trace())) < 4 * estimate.std_error


def test_standard_error_has_its_closed_form():
    matrix = symmetric(30)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    estimate = operator_trace(matrix, probes=3000)
    assert estimate.std_error == pytest.approx(math.sqrt(variance / 3000), rel=0.1)


def test_standard_error_covers_the_truth_at_its_rate():
    """Two standard errors of 32 probes hold the trace in 95 % of runs (Student: 94.6 %)."""
    matrix = symmetric(20, seed=5)
    truth = float(matrix.trace())
    runs = [operator_trace(matrix, probes=32, seed=seed) for seed in range(300)]
    covered = np.mean([abs(r.value - truth) <= 2 * r.std_error for r in runs])
    assert 0.91 < covered < 0.985  # three binomial deviations about 0.946


def test_hessian_trace_agrees_with_central_differences():
    for name in ("attention", "group norm", "tied weight"):
        case = by_name(name)
        truth = float(difference_hessian(case).trace())
        estimate = hessian_trace(case.objective(), probes=200)
        assert abs(estimate.value - truth) < 4 * estimate.std_error


def test_probes_do_not_depend_on_the_batch_size():
    case = by_name("layer norm")
    a, b, c = (
        hessian_trace(case.objective(33, batch_size=size), probes=11) for size in (1, 32, 33)
    )
    assert a.value == pytest.approx(b.value, rel=1e-12)
    assert a.value == pytest.approx(c.value, rel=1e-12)
    assert a.std_error == pytest.approx(b.std_error, rel=1e-9)


def test_more_probes_extend_the_same_sequence(monkeypatch: pytest.MonkeyPatch):
    from entropic_fast.curvature.estimators import _probes

    matrix = symmetric(9)
    samples = [float(s @ matrix @ s) for s in (random.rademacher((9,), 3, i) for i in range(10))]
    for block in (1, 3, 8):
        monkeypatch.setattr(_probes, "BLOCK", block)
        for probes in (4, 10):
            got = operator_trace(matrix, probes=probes, seed=3)
            assert got.value == pytest.approx(np.mean(samples[:probes]))
            expected = np.std(samples[:probes], ddof=1) / probes**0.5
            assert got.std_error == pytest.approx(expected)


def test_seeds_give_other_probes():
    matrix = symmetric(9)
    assert operator_trace(matrix, seed=0).value != operator_trace(matrix, seed=1).value


def test_tolerance_stops_early_and_never_exceeds_the_probes():
    matrix = symmetric(30) + 20 * torch.eye(30)
    loose = operator_trace(matrix, probes=400, tol=0.01)
    assert loose.samples < 400 and loose.samples % 8 == 0
    assert loose.std_error <= 0.01 * abs(loose.value)
    assert loose.converged
    with pytest.warns(NotConvergedWarning, match=r"after 20 samples; raise probes or tol"):
        strict = operator_trace(matrix, probes=20, tol=1e-9)
    assert strict.samples == 20 and not strict.converged
    assert operator_trace(torch.zeros(3, 3), probes=50, tol=0.1).samples == 16


def test_the_objective_and_its_operator_agree():
    obj = by_name("raw parameter").objective()
    assert hessian_trace(obj, probes=5) == operator_trace(HessianOperator(obj), probes=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes: expected an integer of at least 1"),
        ({"probes": 2.0}, "probes"),
        ({"tol": 0.0}, "tol: expected a finite number above 0"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        operator_trace(torch.eye(3), **arguments)
    with pytest.raises(ValueError, match=message):
        hessian_trace(by_name("raw parameter").objective(), **arguments)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (torch.ones(2, 3), r"a square shape \[P, P\]"),
        (torch.ones(3), "a square shape"),
        (torch.ones(0, 0), "a square shape"),
        (torch.eye(3, dtype=torch.int64), "dtype torch.float32 or torch.float64"),
        ("matrix", "something with shape, dtype and @"),
        (torch.full((2, 2), float("nan")), "finite products"),
    ],
)
def test_operators_that_do_not_fit_are_refused(operator, message):
    with pytest.raises(ValueError, match=message):
        operator_trace(operator)


def test_a_negative_trace_is_as_precise_as_a_positive_one():
    for value in (-2.0, 2.0):
        assert precise(Estimate(value, 0.19, 8), 0.1)
        assert not precise(Estimate(value, 0.21, 8), 0.1)
