"""Directions taken out of a trace exactly, shares of layers, quadratic forms."""

import numpy as np
import pytest
import torch
from cases import CASES, by_name, difference_hessian
from known_spectra import spiked, with_spectrum
from torch import Tensor

from entropic_fast._utils.results import Eigenpairs
from entropic_fast.curvature import HessianOperator, hessian_trace, operator_trace, top_eigenvalues
from entropic_fast.curvature.operators._algebra import as_operator
from entropic_fast.ops.random_bits import streams as random

METHODS = pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])


def blocks(obj) -> dict[str, slice]:
    """Where each parameter lies in theta."""
    ends = np.cumsum([0, *(part.numel() for part in obj.split(obj.parameters_vector()).values())])
    return {
        name: slice(int(a), int(b))
        for name, a, b in zip(obj.parameter_names, ends, ends[1:], strict=False)
    }


# -- deflation


def test_known_eigenvectors_leave_the_error_of_the_rest():
    matrix, vectors = with_spectrum(spiked(50))
    top = vectors[:, :4]
    rest = matrix - (top * spiked(50)[:4]) @ top.T
    plain, deflated, expected = (
        operator_trace(matrix, 20),
        operator_trace(matrix, 20, deflate=top),
        operator_trace(rest, 20),
    )
    assert deflated.std_error < plain.std_error / 20
    # Signs v and v less their part in Q give the same forms of the rest.
    assert deflated.std_error == pytest.approx(expected.std_error, rel=1e-8)
    assert deflated.value == pytest.approx(expected.value + float(spiked(50)[:4].sum()))
    assert (deflated.samples, deflated.matvecs) == (20, 24)


@METHODS
def test_any_directions_leave_no_bias(method: str):
    """Random directions, eigenvectors of another matrix: 200 runs, 4 standard deviations."""
    matrix, _ = with_spectrum(spiked(30))
    other = torch.linalg.qr(random.normal((30, 5), 7))[0]
    truth = float(matrix.trace())
    found = [
        operator_trace(matrix, 18, seed=seed, method=method, deflate=other) for seed in range(200)
    ]
    values = np.array([e.value for e in found])
    assert abs(values.mean() - truth) < 4 * values.std() / 200**0.5
    covered = np.mean([abs(e.value - truth) <= 2 * e.std_error for e in found])
    assert 0.75 < covered < 0.99  # few samples of the rest: Student's law is wide


def test_the_mean_over_all_signs_is_the_trace():
    """Exactly unbiased, whatever the directions: every sign vector of length 6 once."""
    matrix = random.normal((6, 6), 1)  # not even symmetric
    q = torch.linalg.qr(random.normal((6, 2), 2))[0]
    v = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6).double().T
    u = v - q @ (q.T @ v)
    mean = (u * (matrix @ u)).sum(0).mean() + (q.T @ matrix @ q).trace()
    assert float(mean) == pytest.approx(float(matrix.trace()))
    u = v[:, :1] - q @ (q.T @ v[:, :1])
    assert operator_trace(matrix, 400, deflate=q).value == pytest.approx(
        float(matrix.trace()), abs=4 * operator_trace(matrix, 400, deflate=q).std_error
    )


@METHODS
def test_columns_need_not_be_orthonormal(method: str):
    matrix, vectors = with_spectrum(spiked(40))
    top = vectors[:, :3]
    mixed = 10 * top @ random.normal((3, 3), 5)
    a, b = (operator_trace(matrix, 15, method=method, deflate=d) for d in (top, mixed))
    assert a.value == pytest.approx(b.value, rel=1e-9)
    twice = torch.cat([top, top[:, :1]], 1)  # dependent: some other direction fills up
    estimate = operator_trace(matrix, 15, method=method, deflate=twice)
    assert abs(estimate.value - float(matrix.trace())) < 5 * estimate.std_error


@METHODS
def test_eigenpairs_of_the_hessian_cut_the_error(method: str):
    obj = by_name("attention").objective(20)
    operator = HessianOperator(obj)
    pairs = top_eigenvalues(operator, k=4, which="LM")
    plain = hessian_trace(obj, probes=24, method=method)
    deflated = hessian_trace(obj, probes=24, method=method, deflate=pairs)
    truth = hessian_trace(obj, probes=obj.num_params, method="xtrace").value
    assert abs(deflated.value - truth) < 4 * deflated.std_error
    if method == "hutchinson":
        assert deflated.std_error < 0.7 * plain.std_error


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_all_directions_leave_nothing(method: str):
    matrix, vectors = with_spectrum(spiked(40))
    estimate = operator_trace(matrix, 20, method=method, deflate=vectors)
    assert estimate.value == pytest.approx(float(matrix.trace()))
    assert estimate.std_error < 1e-12


def test_no_directions_change_nothing():
    matrix, _ = with_spectrum(spiked(40))
    empty = torch.zeros(40, 0, dtype=torch.float64)
    assert operator_trace(matrix, 9, deflate=empty) == operator_trace(matrix, 9)


@pytest.mark.parametrize(
    ("deflate", "message"),
    [
        (torch.ones(30, dtype=torch.float64), r"Eigenpairs or a matrix of shape \[30, r\]"),
        (torch.ones(29, 1, dtype=torch.float64), r"matrix of shape \[30, r\]"),
        ("top", "Eigenpairs or a matrix"),
        (torch.ones(30, 31, dtype=torch.float64), "at most 30 directions"),
        (torch.ones(30, 1), "float64 on cpu"),
        (torch.full((30, 1), float("nan"), dtype=torch.float64), "finite values"),
    ],
)
def test_directions_that_do_not_fit_are_refused(deflate, message):
    matrix, _ = with_spectrum(spiked(30))
    with pytest.raises(ValueError, match=message):
        operator_trace(matrix, 4, deflate=deflate)


# -- shares


@pytest.mark.parametrize("group_by", ["parameter", "module"])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_shares_are_the_blocks_traces_and_add_up(group_by: str, deflated: bool, method: str):
    case = by_name("layer norm")
    obj = case.objective()
    hessian = difference_hessian(case)
    pairs = top_eigenvalues(HessianOperator(obj), k=3) if deflated else None
    found = hessian_trace(obj, probes=40, method=method, deflate=pairs, group_by=group_by)
    whole = hessian_trace(obj, probes=40, method=method, deflate=pairs)
    assert sum(e.value for e in found.values()) == pytest.approx(whole.value, rel=1e-10)
    expected = dict.fromkeys(found, 0.0)
    for name, where in blocks(obj).items():
        key = name if group_by == "parameter" else name.rpartition(".")[0]
        expected[key] += float(hessian[where, where].trace())
    assert list(found) == list(expected)
    for name, estimate in found.items():
        # ReLU-like kinks aside, central differences are good to 1e-8.
        assert abs(estimate.value - expected[name]) < 4.5 * estimate.std_error + 1e-7, name
        assert estimate.samples == whole.samples


def test_shares_standard_errors_cover():
    """150 runs: shares have no bias and two standard errors hold them in some 94 % of runs."""
    case = by_name("raw parameter")
    obj, hessian = case.objective(), difference_hessian(case)
    where = blocks(obj)
    found = [hessian_trace(obj, probes=16, seed=seed, group_by="parameter") for seed in range(150)]
    for name in where:
        truth = float(hessian[where[name], where[name]].trace())
        values = np.array([e[name].value for e in found])
        assert abs(values.mean() - truth) < 4 * values.std() / 150**0.5 + 1e-7
        covered = np.mean([abs(e[name].value - truth) <= 2 * e[name].std_error for e in found])
        assert covered > 0.87


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_shares_by_parameter_sum_to_those_by_module(case):
    obj = case.objective()
    parameters = hessian_trace(obj, probes=5, group_by="parameter")
    modules = hessian_trace(obj, probes=5, group_by="module")
    for name, estimate in modules.items():
        mine = [e.value for p, e in parameters.items() if p.rpartition(".")[0] == name]
        assert estimate.value == pytest.approx(sum(mine), abs=1e-10)


def test_the_tolerance_of_shares_is_that_of_the_whole():
    obj = by_name("layer norm").objective(20)
    found = hessian_trace(obj, probes=400, tol=0.1, group_by="parameter")
    whole = hessian_trace(obj, probes=400, tol=0.1)
    assert {e.samples for e in found.values()} == {whole.samples}
    assert 16 <= whole.samples < 400


def test_shares_that_cannot_be_had_are_refused():
    obj = by_name("layer norm").objective()
    with pytest.raises(ValueError, match="by: expected one of 'parameter', 'module'"):
        hessian_trace(obj, group_by="layer")
    with pytest.raises(ValueError, match=r'group_by: expected None with method="xtrace"'):
        hessian_trace(obj, group_by="module", method="xtrace")
    with pytest.raises(ValueError, match="method: expected one of"):
        hessian_trace(obj, group_by="module", method="hutch")


# -- quadratic forms


class Foreign:
    """An operator that multiplies, and one that forms too."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


class Forming(Foreign):
    products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.products += vectors.shape[1]
        return super().__matmul__(vectors)

    def quadratic_forms(self, vectors: Tensor) -> Tensor:
        return (vectors * (self.matrix @ vectors)).sum(0)


def test_quadratic_forms_of_every_kind_of_operator_agree():
    obj = by_name("raw parameter").objective()
    operator = HessianOperator(obj)
    v = random.normal((obj.num_params, 3), 0)
    dense = operator @ torch.eye(obj.num_params, dtype=torch.float64)
    expected = torch.einsum("pk,pq,qk->k", v, dense, v)
    for kind in (operator, dense, Foreign(dense), Forming(dense)):
        forms = as_operator(kind).quadratic_forms(v)
        assert forms.dtype == torch.float64
        assert torch.allclose(forms, expected, rtol=1e-12)
    assert operator.quadratic_forms(v[:, :0]).shape == (0,)


def test_hutchinson_asks_for_forms_only():
    forming = Forming(with_spectrum(spiked(40))[0])
    a = operator_trace(forming, 20, deflate=torch.eye(40, dtype=torch.float64)[:, :3])
    assert forming.products == 0
    operator_trace(forming, 21, method="hutch++")
    assert forming.products == 7  # the sketch
    b = operator_trace(forming.matrix, 20, deflate=torch.eye(40, dtype=torch.float64)[:, :3])
    assert a.value == pytest.approx(b.value)


def test_forms_that_do_not_fit_are_refused():
    class Bad(Foreign):
        value = torch.ones(2, 2)

        def quadratic_forms(self, vectors: Tensor) -> Tensor:
            return self.value

    bad = Bad(torch.eye(3))
    with pytest.raises(ValueError, match=r"quadratic forms of shape \[2\]"):
        as_operator(bad).quadratic_forms(torch.ones(3, 2))
    bad.value = torch.tensor([1.0, float("inf")])
    with pytest.raises(ValueError, match="finite quadratic forms"):
        as_operator(bad).quadratic_forms(torch.ones(3, 2))


def test_eigenpairs_are_taken_by_their_vectors():
    matrix, vectors = with_spectrum(spiked(40))
    pairs = Eigenpairs(torch.zeros(2), vectors[:, :2], torch.zeros(2), 0, False)
    a, b = (operator_trace(matrix, 8, deflate=d) for d in (pairs, vectors[:, :2]))
    assert a == b
