"""Properties that every registered trace estimator has, new ones included."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from known_spectra import spiked, with_spectrum
from torch import Tensor, nn

from entropic_fast import HessianOperator, Objective, hessian_trace, operator_trace
from entropic_fast.curvature.estimators.trace import METHODS

pytestmark = pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")
ALL = pytest.mark.parametrize("method", list(METHODS))
OF_MATRICES = [name for name, method in METHODS.items() if not method.hessian_only]


def small_objective(scale: float = 1.0) -> Objective:
    """A tanh network of 24 parameters on 12 examples; all its losses times scale."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    y = torch.randn(12, 2, generator=g, dtype=torch.float64)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    return Objective(model, lambda out, target: scale * (out - target).square().sum(1), (x, y))


def dense_hessian(obj: Objective) -> Tensor:
    return HessianOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)


def runs(method: str, count: int, probes: int, deflate: Tensor | None) -> tuple[float, Any]:
    """The trace of a Hessian, and estimates of it; from its matrix, which is faster, if allowed."""
    obj = small_objective()
    matrix = dense_hessian(obj)
    estimates = [
        operator_trace(matrix, probes, seed=seed, method=method, deflate=deflate)
        if method in OF_MATRICES
        else hessian_trace(obj, None, probes, seed=seed, method=method, deflate=deflate)
        for seed in range(count if method in OF_MATRICES else count // 4)
    ]
    return float(matrix.trace()), estimates


@ALL
@pytest.mark.parametrize("deflated", [False, True])
def test_the_mean_of_many_runs_is_the_trace(method: str, deflated: bool):
    """Within 4 standard deviations of the mean of 200 runs."""
    g = torch.Generator().manual_seed(3)
    directions = torch.randn(24, 3, dtype=torch.float64, generator=g) if deflated else None
    truth, estimates = runs(method, 200, 12, directions)
    values = [e.value for e in estimates]
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / len(values) ** 0.5 + 1e-9 * truth


@ALL
def test_two_standard_errors_hold_the_trace(method: str):
    """In 80 % of runs at least: few samples of the remainder, whose law is wide."""
    truth, estimates = runs(method, 200, 18, None)
    held = [abs(e.value - truth) <= 2 * e.std_error + 1e-9 * truth for e in estimates]
    assert np.mean(held) > 0.8


@ALL
def test_a_zero_operator_has_trace_zero_without_error(method: str):
    estimate = hessian_trace(small_objective(0.0), probes=9, method=method)
    assert (estimate.value, estimate.std_error) == (0.0, 0.0)


@pytest.mark.parametrize("method", OF_MATRICES)
@pytest.mark.parametrize("size", [1, 2])
def test_small_matrices_are_exact(method: str, size: int):
    matrix = torch.diag(torch.tensor([2.5, -1.0])[:size])
    estimate = operator_trace(matrix, probes=max(size, 2), method=method)
    assert estimate.value == pytest.approx(float(matrix.trace())) and estimate.std_error == 0


@ALL
def test_one_vector_of_size_one_is_exact(method: str):
    x = torch.tensor([[1.0], [2.0]])
    obj = Objective(nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    assert hessian_trace(obj, probes=1, method=method).value == pytest.approx(5.0)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].group_by])
@pytest.mark.parametrize("group_by", ["parameter", "module"])
@pytest.mark.parametrize("tol", [None, 0.3])
def test_groups_sum_to_the_total(method: str, group_by: str, tol: float | None):
    obj = small_objective()
    total = hessian_trace(obj, probes=23, tol=tol, method=method)
    groups = hessian_trace(obj, probes=23, tol=tol, method=method, group_by=group_by)
    assert sum(e.value for e in groups.values()) == pytest.approx(total.value, rel=1e-10)
    for estimate in groups.values():
        assert (estimate.samples, estimate.matvecs) == (total.samples, total.matvecs)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].group_by])
def test_other_methods_reject_groups_and_name_those_that_take_them(method: str):
    with pytest.raises(ValueError, match=re.escape(f'expected None with method="{method}"')):
        hessian_trace(small_objective(), method=method, group_by="module")


@ALL
def test_too_few_probes_are_rejected(method: str):
    least = METHODS[method].min_probes
    with pytest.raises(ValueError, match=f"probes: expected an integer of at least {least}"):
        hessian_trace(small_objective(), probes=least - 1, method=method)
    assert math.isfinite(hessian_trace(small_objective(), probes=least, method=method).value)


@ALL
def test_results_depend_on_the_seed_alone(method: str):
    obj = small_objective()
    one, again, other = (hessian_trace(obj, probes=10, seed=s, method=method) for s in (0, 0, 1))
    assert one == again and one.value != other.value


@pytest.mark.parametrize("method", OF_MATRICES)
@pytest.mark.parametrize("tol", [None, 0.05])
@pytest.mark.parametrize("deflated", [0, 3])
def test_matvecs_count_the_vectors_multiplied(method: str, tol: float | None, deflated: int):
    class Counting:
        def __init__(self, matrix: Tensor) -> None:
            self.matrix, self.shape, self.dtype, self.vectors = (
                matrix,
                matrix.shape,
                matrix.dtype,
                0,
            )

        def __matmul__(self, vectors: Tensor) -> Tensor:
            self.vectors += vectors.shape[1]
            return self.matrix @ vectors

    matrix, vectors = with_spectrum(spiked(80))
    for probes in (5, 40, 75):
        counting = Counting(matrix)
        estimate = operator_trace(
            counting, probes, tol, method=method, deflate=vectors[:, :deflated]
        )
        assert counting.vectors == estimate.matvecs <= probes + deflated


@ALL
def test_a_tolerance_ends_it_early(method: str):
    obj = small_objective()
    loose = hessian_trace(obj, probes=23, tol=10.0, method=method)
    assert loose.converged and loose.matvecs < 24
    strict = hessian_trace(obj, probes=23, tol=1e-12, method=method)
    assert strict.converged == (strict.std_error <= 1e-12 * abs(strict.value))
