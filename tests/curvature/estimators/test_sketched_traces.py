"""Hutch++ and XTrace: their published formulas, no bias, errors that cover, fewer products."""

import math

import numpy as np
import pytest
import torch
from cases import by_name
from known_spectra import decaying, spiked, with_spectrum
from torch import Tensor

from entropic_fast import NotConvergedWarning
from entropic_fast._utils.results import Estimate
from entropic_fast.curvature import hessian_trace, operator_trace
from entropic_fast.ops.random_bits import streams as random

SKETCHED = pytest.mark.parametrize("method", ["hutch++", "xtrace"])


class Counting:
    """A matrix that counts the vectors it multiplies."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        self.vectors = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.vectors += vectors.shape[1]
        return self.matrix @ vectors


def runs(matrix: Tensor, method: str, count: int, probes: int) -> list[Estimate]:
    return [operator_trace(matrix, probes, seed=seed, method=method) for seed in range(count)]


def signs(size: int, count: int, key: int) -> Tensor:
    return torch.stack([random.rademacher((size,), key, i) for i in range(count)], 1)


def leave_one_out(matrix: Tensor, omega: Tensor) -> Tensor:
    """The l estimates of XTrace, each with a QR decomposition of its own."""
    found = []
    for i, w in enumerate(omega.T):
        others = torch.cat([omega[:, :i], omega[:, i + 1 :]], 1)
        q = torch.linalg.qr(matrix @ others)[0]
        u = w - q @ (q.T @ w)
        found.append((q.T @ matrix @ q).trace() + u @ matrix @ u)
    return torch.stack(found)


@pytest.mark.parametrize("probes", [2, 3, 8, 20, 31])
def test_xtrace_equals_its_explicit_formula(probes: int):
    matrix, _ = with_spectrum(spiked(40))
    expected = leave_one_out(matrix, signs(40, probes // 2, random.fold_in(3, "xtrace")))
    got = operator_trace(matrix, probes, seed=3, method="xtrace")
    assert got.value == pytest.approx(float(expected.mean()), rel=1e-10)
    assert got.matvecs == 2 * (probes // 2)
    if probes < 4:
        assert math.isnan(got.std_error)
    else:  # the paper's estimate: the samples' deviation over sqrt(l)
        error = float(expected.std() / (probes // 2) ** 0.5)
        assert got.std_error == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("probes", [4, 11, 30])
def test_hutchpp_equals_its_explicit_formula(probes: int):
    matrix, _ = with_spectrum(spiked(40))
    k = probes // 3
    q = torch.linalg.qr(matrix @ signs(40, k, random.fold_in(3, "sketch")))[0]
    v = signs(40, probes - 2 * k, 3)
    u = v - q @ (q.T @ v)
    rest = (u * (matrix @ u)).sum(0)
    got = operator_trace(matrix, probes, seed=3, method="hutch++")
    expected = (q.T @ matrix @ q).trace() + rest.mean()
    assert got.value == pytest.approx(float(expected), rel=1e-10)
    assert got.std_error == pytest.approx(float(rest.std() / len(rest) ** 0.5), rel=1e-8)
    assert got.matvecs == probes


@pytest.mark.parametrize("values", [spiked(100), decaying(100, 0.9)], ids=["spiked", "decaying"])
@pytest.mark.parametrize(("method", "least"), [("hutch++", 0.9), ("xtrace", 0.7)])
def test_neither_has_a_bias_and_standard_errors_cover(method: str, least: float, values: Tensor):
    """The mean of 200 runs is within 4 of its standard deviations.

    Hutch++: two standard errors hold the trace in 95 % of runs (Student with 11 degrees of
    freedom: 93 %), and their mean square is the variance (a ratio good to 10 %). XTrace's errors,
    as published, are up to a third too small.
    """
    matrix, _ = with_spectrum(values, seed=1)
    truth = float(matrix.trace())
    found = runs(matrix, method, 200, 36)
    got = np.array([e.value for e in found])
    errors = np.array([e.std_error for e in found])
    assert abs(got.mean() - truth) < 4 * got.std() / 200**0.5
    assert least - 0.1 < np.sqrt(np.mean(errors**2)) / got.std() < 1.2
    covered = np.mean(abs(got - truth) <= 2 * errors)
    assert least - 0.04 < covered < 0.985


@SKETCHED
def test_errors_fall_fast_where_eigenvalues_decay(method: str):
    """Hutchinson's error falls as 1 / sqrt(probes): from 12 to 48 by 2."""
    matrix, _ = with_spectrum(decaying(60, 0.5))
    truth = float(matrix.trace())

    def error(kind: str, probes: int) -> float:
        return float(np.std([e.value - truth for e in runs(matrix, kind, 40, probes)]))

    assert error(method, 12) < 0.4 * error("hutchinson", 12)
    assert error(method, 48) < error(method, 12) / 50
    assert 0.3 < error("hutchinson", 48) / error("hutchinson", 12) < 0.8


@SKETCHED
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_is_exact(method: str, rank: int):
    values = torch.zeros(30, dtype=torch.float64)
    values[:rank] = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)[:rank]
    matrix, _ = with_spectrum(values)
    estimate = operator_trace(matrix, 24, method=method)
    assert estimate.value == pytest.approx(float(values.sum()), abs=1e-12)
    assert estimate.std_error < 1e-12


@SKETCHED
def test_low_rank_in_float32_is_exact_to_rounding(method: str):
    matrix, _ = with_spectrum(torch.cat([torch.tensor([30.0, 5.0, 1.0]), torch.zeros(200)]))
    estimate = operator_trace(matrix.float(), 24, method=method)
    assert estimate.value == pytest.approx(36, rel=1e-5)
    assert estimate.std_error < 1e-4


def test_xtrace_is_right_where_sign_vectors_coincide():
    """Of 4 sign vectors of length 5, two are often the same up to sign."""
    matrix, _ = with_spectrum(torch.tensor([3.0, 2.0, 1.0, -1.0, 0.5]).double())
    matrix = torch.block_diag(matrix, torch.zeros(4, 4))  # signs beyond the first 5 do not count
    seen = 0
    for seed in range(60):
        omega = signs(9, 4, random.fold_in(seed, "xtrace"))
        products = matrix @ omega
        got = operator_trace(matrix, 8, seed=seed, method="xtrace")
        if torch.linalg.matrix_rank(products) == 4:
            continue
        seen += 1
        expected = []
        for i, w in enumerate(omega.T):
            left, lengths, _ = torch.linalg.svd(products[:, [j for j in range(4) if j != i]])
            q = left[:, :3][:, lengths > 1e-10]
            u = w - q @ (q.T @ w)
            expected.append(float((q.T @ matrix @ q).trace() + u @ matrix @ u))
        assert got.value == pytest.approx(np.mean(expected), rel=1e-9)
    assert seen > 5


@SKETCHED
@pytest.mark.parametrize("size", [1, 2, 7])
def test_as_many_probes_as_parameters_are_exact(method: str, size: int):
    matrix, _ = with_spectrum(torch.linspace(-1, 3, size))
    counting = Counting(matrix)
    estimate = operator_trace(counting, max(size, 3), method=method)
    assert estimate == Estimate(pytest.approx(float(matrix.trace())), 0.0, size, matvecs=size)
    assert counting.vectors == size


@pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")
@SKETCHED
@pytest.mark.parametrize("tol", [None, 0.01])
def test_no_more_vectors_than_said(method: str, tol: float | None):
    for matrix in (with_spectrum(spiked(80))[0], with_spectrum(decaying(80, 0.9))[0]):
        for probes in (5, 12, 40, 75):
            counting = Counting(matrix)
            estimate = operator_trace(counting, probes, tol, method=method)
            assert counting.vectors == estimate.matvecs <= probes


@SKETCHED
def test_a_tolerance_is_met_with_fewer_vectors_than_hutchinsons(method: str):
    matrix, _ = with_spectrum(decaying(200, 0.8))
    estimate = operator_trace(matrix, 190, tol=0.01, method=method)
    assert estimate.std_error <= 0.01 * estimate.value
    assert abs(estimate.value - float(matrix.trace())) < 4 * estimate.std_error
    assert 32 <= estimate.matvecs < 100
    with pytest.warns(NotConvergedWarning):
        plain = operator_trace(matrix, 190, tol=0.01)
    assert plain.matvecs == 190 and plain.std_error > 0.01 * plain.value


def test_hutchpp_doubles_its_sketch_only_where_that_pays():
    """A flat spectrum leaves nothing to a sketch: 8 vectors, then samples."""
    flat, _ = with_spectrum(torch.linspace(1, 3, 300))
    counting = Counting(flat)
    estimate = operator_trace(counting, 280, tol=0.03, method="hutch++")
    assert estimate.std_error <= 0.03 * estimate.value
    assert estimate.matvecs <= 48


@SKETCHED
def test_stopping_early_keeps_errors_honest(method: str):
    matrix, _ = with_spectrum(spiked(60, bulk=0.4), seed=2)
    truth = float(matrix.trace())
    found = [operator_trace(matrix, 59, tol=0.05, seed=seed, method=method) for seed in range(200)]
    assert min(e.matvecs for e in found) >= 32
    covered = np.mean([abs(e.value - truth) <= 2 * e.std_error for e in found])
    assert covered > 0.85


@SKETCHED
def test_more_probes_extend_the_same_signs(method: str):
    """With a tolerance never met, the result is that of all probes at once."""
    matrix, _ = with_spectrum(spiked(60))
    if method == "xtrace":
        with pytest.warns(NotConvergedWarning, match="after 25 samples"):
            patient = operator_trace(matrix, 50, tol=1e-9, method=method)
        assert not patient.converged
        assert patient.value == pytest.approx(operator_trace(matrix, 50, method=method).value)
    one, other = (operator_trace(matrix, 50, seed=s, method=method) for s in (0, 1))
    assert one.value != other.value
    assert one == operator_trace(matrix, 50, seed=0, method=method)


@SKETCHED
def test_block_width_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch):
    from entropic_fast.curvature.estimators import _probes as probes
    from entropic_fast.curvature.estimators.trace import hutchpp, xtrace

    matrix, _ = with_spectrum(spiked(60))
    expected = operator_trace(matrix, 40, method=method)
    for module in (hutchpp, probes, xtrace):
        monkeypatch.setattr(module, "BLOCK", 3)
    got = operator_trace(matrix, 40, method=method)
    assert got.value == pytest.approx(expected.value, rel=1e-10)
    assert got.std_error == pytest.approx(expected.std_error, rel=1e-6)


@SKETCHED
def test_hessian_of_a_network(method: str):
    obj = by_name("layer norm").objective(20)
    exact = hessian_trace(obj, probes=obj.num_params, method=method)
    estimate = hessian_trace(obj, probes=40, method=method)
    assert exact.std_error == 0
    assert abs(estimate.value - exact.value) < 4 * estimate.std_error
    assert estimate.std_error < hessian_trace(obj, probes=40).std_error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lanczos"}, "method: expected one of 'hutchinson', 'hutch\\+\\+', 'xtrace'"),
        ({"method": "hutch++", "probes": 2}, "probes: expected an integer of at least 3"),
        ({"method": "xtrace", "probes": 1}, "probes: expected an integer of at least 2"),
        ({"method": "xtrace", "probes": 2.5}, "probes"),
        ({"method": "xtrace", "tol": -1.0}, "tol"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        operator_trace(torch.eye(50), **arguments)


def test_a_sketch_that_does_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    from entropic_fast.curvature.estimators.trace import _deflation as sketch

    monkeypatch.setattr(sketch, "available_bytes", lambda device: 3 * 10 * 50 * 4 - 1)
    for method in ("xtrace", "hutch++"):
        with pytest.raises(ValueError, match='take fewer, or method="hutchinson"'):
            operator_trace(torch.eye(50), 48, method=method)
    operator_trace(torch.eye(50), 12, method="xtrace")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_a_gpu_gives_the_same_estimate(method: str):
    matrix, vectors = with_spectrum(spiked(60))
    for deflate in (None, vectors[:, :2]):
        expected = operator_trace(matrix, 24, method=method, deflate=deflate)
        there = None if deflate is None else deflate.cuda()
        got = operator_trace(matrix.cuda(), 24, method=method, deflate=there)
        assert got.value == pytest.approx(expected.value, rel=1e-9)
        assert got.std_error == pytest.approx(expected.std_error, rel=1e-6)
        assert got.matvecs == expected.matvecs
