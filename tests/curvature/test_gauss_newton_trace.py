"""The trace with its Gauss-Newton part exact: what is left to probes is the network's curvature."""

import pytest
import torch
from cases import CASES, by_name
from torch import nn

from entropic_fast import random
from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    ggn_trace,
    hessian_trace,
    without_rules,
)
from entropic_fast.objective import Objective

NAMES = [case.name for case in CASES if case.name not in ("lstm", "data-dependent branch")]


@pytest.mark.parametrize("name", NAMES)
def test_network_forms_are_the_hessian_less_the_gauss_newton_matrix(name: str):
    obj = by_name(name).objective(3)
    H, G = HessianOperator(obj), GGNOperator(obj)
    vectors = random.normal((obj.num_params, 5), 1, dtype=obj.dtype)
    expected = H.quadratic_forms(vectors) - G.quadratic_forms(vectors)
    scale = float(H.quadratic_forms(vectors).abs().max())
    torch.testing.assert_close(H.network_forms(vectors), expected, rtol=0, atol=1e-9 * scale)


def test_by_autograd_they_are_the_same():
    obj = by_name("residual in place").objective(3)
    vectors = random.normal((obj.num_params, 3), 1, dtype=obj.dtype)
    by_rules = HessianOperator(obj).network_forms(vectors)
    with without_rules():
        operator = HessianOperator(obj)
        torch.testing.assert_close(operator.network_forms(vectors), by_rules)
        assert operator.way.startswith("autograd")


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
    assert loose.probes < 400 and loose.std_error <= 0.5 * abs(loose.value)


def test_a_linear_model_needs_no_probes():
    """All curvature is the loss's: the estimate is exact and has no error."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randint(3, (9,), generator=g)
    obj = Objective(nn.Linear(4, 3).double(), "cross_entropy", data)
    estimate = hessian_trace(obj, probes=2, method="gauss-newton")
    assert estimate.value == pytest.approx(ggn_trace(obj).value)
    assert estimate.std_error == pytest.approx(0, abs=1e-12)


def test_parts_and_batch_statistics_are_refused():
    obj = by_name("raw parameter").objective(3)
    with pytest.raises(ValueError, match=r'by: expected None with method="gauss-newton"'):
        hessian_trace(obj, method="gauss-newton", by="module")
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
