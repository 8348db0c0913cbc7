"""Objectives at the parameters and statistics of a model that trains on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn

import entropic_fast as ef

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double() * 2 + 1
Y = torch.arange(40) % 3


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_objective_follows_a_model_that_trains(wrapped: bool):
    model = network()
    obj = ef.Objective(model, "cross_entropy", (X, Y))
    for _ in range(3):
        trained(model)
        there = obj.at(torch.optim.swa_utils.AveragedModel(model) if wrapped else model)
        fresh = ef.Objective(model, "cross_entropy", (X, Y))
        v = torch.randn(obj.num_params).double()
        assert there.loss() == fresh.loss()
        assert torch.equal(there.parameters_vector(), fresh.parameters_vector())
        operators = ef.HessianOperator(there), ef.HessianOperator(fresh)
        assert operators[0].method == "graph"
        assert relative_error(operators[0] @ v, operators[1] @ v) < 1e-12
        assert relative_error(ef.score_matrix(there), ef.score_matrix(fresh)) < 1e-12
    assert obj.loss() == ef.Objective(network(), "cross_entropy", (X, Y)).loss()  # as it was


def test_it_is_a_copy_both_ways():
    model = network()
    there = ef.Objective(model, "cross_entropy", (X, Y)).at(trained(model))
    before, held = there.loss(), copy.deepcopy(model.state_dict())
    trained(model)
    assert there.loss() == before
    there.load_into(model, there.parameters_vector())
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, held[name])


def test_frozen_parameters_of_the_model_count():
    model = network()
    model[0].weight.requires_grad_(False)
    obj = ef.Objective(model, "cross_entropy", (X, Y))
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    there, fresh = obj.at(model), ef.Objective(model, "cross_entropy", (X, Y))
    v = torch.randn(obj.num_params).double()
    assert there.loss() == fresh.loss() != obj.loss()
    found = ef.HessianOperator(there) @ v
    assert relative_error(found, ef.HessianOperator(fresh) @ v) < 1e-12
    assert (
        relative_error(there.with_norm("batch").gradient(), fresh.with_norm("batch").gradient())
        < 1e-12
    )
    theta = there.parameters_vector()
    path = ef.linear_path(theta, theta + 0.1, 3)
    runs = [
        ef.relax(
            o,
            path,
            0.5,
            ef.ProjectedSGD(0.1, 8, steps=4),
            replicas=3,
            execution=ef.Execution(backend=e),
        )
        for o, e in ((there, "threads"), (fresh, "loop"))
    ]
    assert torch.allclose(runs[0].position, runs[1].position, atol=1e-9)
    other = network()
    there.load_into(other, theta)
    assert torch.equal(other[0].weight, model[0].weight)


def test_tied_and_complex_parameters_are_read_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False).double()
            self.b = nn.Linear(6, 6, bias=False).double()
            self.b.weight = self.a.weight
            self.c = nn.Parameter(torch.randn(6, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (self.b(torch.tanh(self.a(x))) * self.c).real

    model = Tied()
    obj = ef.Objective(model, "mse", (X, X))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert obj.at(model).loss() == ef.Objective(model, "mse", (X, X)).loss()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(6, 3).double(), "no '0.weight'"),
        (nn.Sequential(nn.Linear(6, 7)).double(), r"got '0.weight' of shape \[7, 6\]"),
        (network().float(), r"got '0.weight' of shape \[8, 6\] of float32"),
        ({"0.weight": X}, "an nn.Module"),
    ],
)
def test_other_architectures_are_rejected(other: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        ef.Objective(network(), "cross_entropy", (X, Y)).at(other)


def far(obj: ef.Objective) -> Tensor:
    return obj.parameters_vector() + 0.1 * torch.ones(obj.num_params).double()


@pytest.mark.filterwarnings("always:normalization statistics")
def test_a_point_far_from_the_statistics_is_warned_about_once():
    obj = ef.Objective(network(), "cross_entropy", (X, Y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obj.loss(obj.parameters_vector() * (1 + 1e-3))
        obj.recalibrated(far(obj)).loss(far(obj))
        obj.with_norm("batch").loss(far(obj))
        obj.load_into(network(), far(obj))
        ef.path_losses(obj, ef.linear_path(obj.parameters_vector(), far(obj), 3), 3)
        plain = ef.Objective(nn.Linear(6, 3).double(), "cross_entropy", (X, Y))
        plain.loss(plain.parameters_vector() + 9)
    with pytest.warns(ef.StaleStatisticsWarning, match=r"objective.recalibrated\(theta\)"):
        ef.HessianOperator(obj, far(obj))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obj.loss(far(obj))
