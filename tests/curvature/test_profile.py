"""Profiles along a path: every column is what its own function says at that point."""

import math

import pytest
import torch
from cases import by_name
from torch import Tensor, nn

from entropic_fast.curvature import (
    HessianOperator,
    curvature_profile,
    fisher_trace,
    hessian_trace,
    profile_point,
    profile_positions,
    top_eigenvalues,
)
from entropic_fast.objective import Objective
from entropic_fast.paths.path import Path
from entropic_fast.table import Table

ALL = [
    "s", "loss", "accuracy", "fisher_trace", "fisher_trace_std_error", "hessian_trace",
    "hessian_trace_std_error", "top_eigenvalue", "top_eigenvalue_residual",
    "top_eigenvalue_converged", "norm", "norm_examples",
]  # fmt: skip


def path_from(obj: Objective) -> Path:
    theta = obj.parameters_vector()
    bend = torch.linspace(-1, 1, len(theta), dtype=theta.dtype)
    return Path(torch.stack([theta, theta + bend, theta + 0.3]))


def batch_norm_objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    return Objective(model, "cross_entropy", (x, y), batch_size=10)


def test_every_column_is_its_own_function_at_that_point():
    obj = by_name("module twice").objective(12)
    path = path_from(obj)
    table = curvature_profile(obj, path, points=3, seed=5, probes=6, tol=1e-6)
    assert list(table.columns) == ALL
    assert table["s"].tolist() == [0.0, 0.5, 1.0]
    for i, s in enumerate((0.0, 0.5, 1.0)):
        theta = path.point(s)
        trace, fisher = hessian_trace(obj, theta, probes=6, seed=5), fisher_trace(obj, theta)
        top = top_eigenvalues(HessianOperator(obj, theta), tol=1e-6, seed=5)
        row = table.rows()[i]
        assert (row["loss"], row["accuracy"]) == obj.evaluate(theta)
        assert row["hessian_trace"] == pytest.approx(trace.value, rel=1e-12)
        assert row["hessian_trace_std_error"] == pytest.approx(trace.std_error, rel=1e-12)
        assert row["fisher_trace"] == pytest.approx(fisher.value, rel=1e-12)
        assert row["fisher_trace_std_error"] == pytest.approx(fisher.std_error, rel=1e-12)
        assert row["top_eigenvalue"] == pytest.approx(float(top.values[0]), rel=1e-9)
        assert row["top_eigenvalue_residual"] <= 1e-6 * row["top_eigenvalue"]
        assert row["top_eigenvalue_converged"] == 1
        assert row["norm"] == pytest.approx(float(theta.norm()), rel=1e-12)
        assert row["norm_examples"] == 0


def test_statistics_are_re_estimated_at_each_point_and_the_table_says_so():
    obj = batch_norm_objective()
    path = path_from(obj)
    wanted = ("loss", "fisher_trace")
    table = curvature_profile(obj, path, points=[0.25], quantities=wanted)
    stale = curvature_profile(obj, path, points=[0.25], quantities=wanted, recalibrate=False)
    some = curvature_profile(obj, path, points=[0.25], quantities=wanted, recalibrate=10)
    theta = path.point(0.25)
    assert table["norm_examples"].tolist() == [20]
    assert stale["norm_examples"].tolist() == [0]
    assert some["norm_examples"].tolist() == [10]
    assert table["loss"][0] == pytest.approx(obj.recalibrated(theta).loss(theta))
    assert stale["loss"][0] == pytest.approx(obj.loss(theta))
    fewer = obj.recalibrated(theta, max_examples=10)
    assert some["fisher_trace"][0] == pytest.approx(fisher_trace(fewer, theta).value)
    assert len({table["loss"][0], stale["loss"][0], some["loss"][0]}) == 3


def test_rows_can_be_made_one_at_a_time():
    obj = by_name("tied weight").objective()
    path, rows = path_from(obj), []
    table = curvature_profile(
        obj, path, points=4, probes=3, on_point=lambda i, row: rows.append((i, row))
    )
    assert [i for i, _ in rows] == [0, 1, 2, 3]
    single = profile_point(obj, path.point(1 / 3), probes=3)
    assert {"s": 1 / 3, **single} == rows[1][1] == table.rows()[1]


def test_a_profile_survives_its_file(tmp_path):
    obj = by_name("tied weight").objective()
    table = curvature_profile(obj, path_from(obj), points=2, probes=2)
    table.to_csv(tmp_path / "profile.csv")
    assert Table.from_csv(tmp_path / "profile.csv").rows() == table.rows()


def test_only_what_is_asked_for_in_that_order():
    obj = by_name("tied weight").objective()
    table = curvature_profile(obj, path_from(obj), points=2, quantities=("norm", "loss"))
    assert list(table.columns) == ["s", "norm", "loss", "accuracy", "norm_examples"]


def test_a_regression_has_no_accuracy():
    x = torch.randn(5, 2)
    obj = Objective(nn.Linear(2, 1), "mse", (x, x[:, :1]))
    row = profile_point(obj, quantities=("loss",))
    assert list(row) == ["loss", "norm_examples"]


def test_one_parameter_and_one_example():
    x = torch.tensor([[2.0]])
    obj = Objective(nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    row = profile_point(obj, torch.tensor([1.0]), probes=2)
    assert row["loss"] == 16 and row["fisher_trace"] == 256
    assert math.isnan(row["fisher_trace_std_error"])
    assert row["hessian_trace"] == row["top_eigenvalue"] == 8


def test_positions_are_evenly_spaced_with_both_ends():
    assert profile_positions(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert profile_positions((0.5, 0.1)) == [0.5, 0.1]
    for bad in (1, 0, True, (), [0.5, 1.01], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="points"):
            profile_positions(bad)


@pytest.mark.parametrize("bad", ["loss", (), ("loss", "sharpness")])
def test_unknown_quantities_are_refused(bad):
    obj = by_name("tied weight").objective()
    with pytest.raises(ValueError, match="quantities"):
        curvature_profile(obj, path_from(obj), points=2, quantities=bad)


def test_quantities_of_single_examples_are_refused_before_any_work():
    obj = batch_norm_objective().with_norm("batch")
    called = []

    class Recorder:
        def point(self, s: float) -> Tensor:
            called.append(s)
            return obj.parameters_vector()

    with pytest.raises(ValueError, match="depend on that example alone"):
        curvature_profile(obj, Recorder(), points=2)
    assert not called
    table = curvature_profile(obj, Recorder(), points=2, quantities=("loss", "hessian_trace"))
    assert table["norm_examples"].tolist() == [0, 0] and called == [0.0, 1.0]
