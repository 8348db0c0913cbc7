"""The trace with its Gauss-Newton part from gradients: probes are for the network's curvature."""

import pytest
import torch
from cases import CASES, by_name
from torch import nn

from entropic_fast import NotConvergedWarning
from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    autograd_only,
    fisher_eigenvalues,
    fisher_trace,
    ggn_trace,
    gradient_norms,
    hessian_trace,
    ntk_gram,
    score_gram,
    score_matrix,
    score_spectrum,
    with_sampled_labels,
)
from entropic_fast.curvature.estimators.trace.gauss_newton import quick_ggn_trace
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits import streams as random

NAMES = [case.name for case in CASES if case.name not in ("lstm", "data-dependent branch")]


@pytest.mark.parametrize("name", NAMES)
def test_network_forms_are_the_hessian_less_the_gauss_newton_matrix(name: str):
    obj = by_name(name).objective(3)
    H, G = HessianOperator(obj), GGNOperator(obj)
    vectors = random.normal((obj.num_params, 5), 1, dtype=obj.dtype)
    expected = H.quadratic_forms(vectors) - G.quadratic_forms(vectors)
    scale = float(H.quadratic_forms(vectors).abs().max())
    torch.testing.assert_close(
        (H - G).quadratic_forms(vectors), expected, rtol=0, atol=1e-9 * scale
    )


def network_forms(obj: Objective, vectors: torch.Tensor) -> torch.Tensor:
    return (HessianOperator(obj) - GGNOperator(obj)).quadratic_forms(vectors)


def test_by_autograd_they_are_the_same():
    obj = by_name("residual in place").objective(3)
    vectors = random.normal((obj.num_params, 3), 1, dtype=obj.dtype)
    by_graph = network_forms(obj, vectors)
    with autograd_only():
        operator = HessianOperator(obj) - GGNOperator(obj)
        torch.testing.assert_close(operator.quadratic_forms(vectors), by_graph)
        assert operator.hessian.method.startswith("autograd")


@pytest.mark.parametrize("name", ["residual in place", "attention", "raw parameter"])
def test_the_trace_is_that_of_all_unit_vectors(name: str):
    obj = by_name(name).objective(3)
    units = torch.eye(obj.num_params, dtype=obj.dtype)
    truth = float(HessianOperator(obj).quadratic_forms(units).sum())
    estimate = hessian_trace(obj, probes=400, method="gauss-newton")
    assert abs(estimate.value - truth) < 4 * estimate.std_error
    deflated = hessian_trace(obj, probes=400, method="gauss-newton", deflate=units[:, :3])
    assert abs(deflated.value - truth) < 4 * deflated.std_error
    loose = hessian_trace(obj, probes=400, tol=0.5, method="gauss-newton")
    assert loose.samples < 400 and loose.std_error <= 0.5 * abs(loose.value)


def test_a_linear_model_needs_no_probes():
    """All curvature is the loss's: the estimate is exact and has no error."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randint(3, (9,), generator=g)
    obj = Objective(nn.Linear(4, 3).double(), "cross_entropy", data)
    estimate = hessian_trace(obj, probes=2, method="gauss-newton")
    assert estimate.value == pytest.approx(ggn_trace(obj).value)
    assert estimate.std_error == pytest.approx(0, abs=1e-12)


def many_classes(loss: str = "cross_entropy", count: int = 40) -> Objective:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=g, dtype=torch.float64)
    y = {
        "cross_entropy": torch.randint(9, (count,), generator=g),
        "mse": torch.randn(count, 9, generator=g, dtype=torch.float64),
    }
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9)).double()
    return Objective(net, loss, (x, y[loss]))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_four_gradients_an_example_estimate_the_gauss_newton_part(loss: str):
    obj = many_classes(loss)
    truth = ggn_trace(obj).value
    found = [quick_ggn_trace(obj, obj.parameters_vector(), seed) for seed in range(200)]
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - truth) < 4 * spread / 200**0.5
    claimed = float(torch.tensor([e.std_error**2 for e in found]).mean()) ** 0.5
    assert claimed == pytest.approx(spread, rel=0.2) and spread < 0.1 * truth


def test_it_does_not_depend_on_how_examples_are_batched():
    obj = many_classes()
    theta = obj.parameters_vector()
    pieces = obj.with_data(obj.tensors(), batch_size=7)
    one, other = (quick_ggn_trace(o, theta, 3) for o in (obj, pieces))
    assert (one.value, one.std_error) == pytest.approx((other.value, other.std_error), rel=1e-12)


def test_few_directions_and_losses_that_bend_downwards_are_taken_exactly():
    few = by_name("residual in place").objective(3)
    down = Objective(
        nn.Linear(5, 9).double(),
        lambda out, y: -(out**2).sum(1) + out[:, 0] ** 4,
        (torch.randn(6, 5, dtype=torch.float64), torch.zeros(6)),
    )
    for obj in (few, down):
        found = quick_ggn_trace(obj, obj.parameters_vector(), 0)
        assert found.value == pytest.approx(ggn_trace(obj).value, rel=1e-12)
        assert found.std_error == 0


def test_a_tolerance_that_four_gradients_miss_makes_it_exact():
    obj = many_classes()
    theta = obj.parameters_vector()
    assert quick_ggn_trace(obj, theta, 0).std_error > 1e-6 * ggn_trace(obj).value
    with pytest.warns(NotConvergedWarning):
        estimate = hessian_trace(obj, probes=20, tol=1e-6, method="gauss-newton")
    again = hessian_trace(obj, probes=20, method="gauss-newton")
    assert estimate.std_error < again.std_error  # of the same 20 probes, less that of the draws


def test_few_examples_are_taken_exactly():
    obj = many_classes(count=3)
    found = quick_ggn_trace(obj, obj.parameters_vector(), 0)
    assert found.value == pytest.approx(ggn_trace(obj).value, rel=1e-12) and found.std_error == 0


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_numbers(switch):
    obj = many_classes()
    functions = {
        "ggn": lambda: ggn_trace(obj).value,
        "hessian": lambda: hessian_trace(obj, probes=8, method="gauss-newton").value,
        "fisher": lambda: fisher_trace(obj).value,
        "norms": lambda: float(gradient_norms(obj).sum()),
        "gram": lambda: float(score_gram(obj).trace()),
        "spectrum": lambda: float(score_spectrum(obj).sum()),
        "matrix": lambda: float(score_matrix(obj).square().sum()),
        "ntk": lambda: float(ntk_gram(obj, max_examples=3).sum()),
        "labels": lambda: fisher_trace(with_sampled_labels(obj)).value,
        "eigenvalues": lambda: float(fisher_eigenvalues(obj, 1).values[0]),
    }
    for name, function in functions.items():
        expected = function()
        with switch():
            assert function() == pytest.approx(expected, rel=1e-9), name


def test_parts_and_batch_statistics_are_refused():
    obj = by_name("raw parameter").objective(3)
    with pytest.raises(ValueError, match=r'by: expected None with method="gauss-newton"'):
        hessian_trace(obj, method="gauss-newton", group_by="module")
    batch = Objective(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        "cross_entropy",
        (torch.randn(6, 4), torch.arange(6) % 3),
        norm="batch",
    )
    with pytest.raises(ValueError, match="norm"):
        hessian_trace(batch, method="gauss-newton")


def test_an_unknown_method_is_refused_with_all_there_are():
    with pytest.raises(ValueError, match=r"method: expected .*'gauss-newton'"):
        hessian_trace(by_name("raw parameter").objective(3), method="gauss")
