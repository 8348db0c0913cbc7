"""Compiled functions within models and losses run as they were written, and nothing is compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast._torch.uncompiled import eager
from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    autograd_only,
    gradient_norms,
    hessian_trace,
    score_matrix,
)
from entropic_fast.dynamics import Execution, ProjectedSGD, relax
from entropic_fast.objective import Objective
from entropic_fast.paths import Path, path_losses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
Y = torch.arange(6) % 3


def refuses(graph, inputs):
    raise AssertionError("compiled")


def compiled(function):
    return torch.compile(function, backend=refuses)


@torch.compile(backend=refuses)
def helper(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2


class Plain(nn.Module):
    """Functions in every place where they may be compiled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act: Callable[[Tensor], Tensor] = torch.sin

    def method(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(torch.tanh(self.first(x)) * 2)
        return self.third(self.second(self.method(h)))


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.act = compiled(torch.sin)
        self.second.compile(backend=refuses)

    @torch.compile(backend=refuses, fullgraph=True)
    def method(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.method(self.act(helper(self.first(x))))))


class CompiledForward(Plain):
    forward = torch.compile(Plain.forward, backend=refuses)


def compiled_child() -> nn.Module:
    model = Plain()
    model.second = torch.compile(model.second, backend=refuses)
    return model


def compiled_whole() -> nn.Module:
    return torch.compile(Compiled(), backend=refuses)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - functional.one_hot(targets, 3)).square().sum(1)


MODELS = [Compiled, CompiledForward, compiled_child, compiled_whole]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("loss", ["cross_entropy", "compiled"])
def test_all_is_as_without_compilation(make, loss: str):
    given = (compiled(squares), squares) if loss == "compiled" else (loss, loss)
    obj, plain = (
        Objective(model.double(), one, (X, Y))
        for model, one in zip((make(), Plain()), given, strict=True)
    )
    v = torch.linspace(-1, 1, plain.num_params, dtype=torch.float64)
    assert obj.loss() == plain.loss() and torch.equal(obj.gradient(), plain.gradient())
    assert torch.allclose(score_matrix(obj), score_matrix(plain))
    assert torch.allclose(gradient_norms(obj), gradient_norms(plain))
    for operator in (HessianOperator, GGNOperator, JacobianOperator):
        found = operator(obj)
        assert found.method == "graph"
        assert torch.allclose(found @ v, operator(plain) @ v)
        with autograd_only():
            assert torch.allclose(operator(obj) @ v, operator(plain) @ v)
    traces = [hessian_trace(one, probes=2).value for one in (obj, plain)]
    assert traces[0] == pytest.approx(traces[1])


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_paths_and_dynamics(backend: str):
    found = []
    for make in (Compiled, Plain):
        obj = Objective(make().double(), "cross_entropy", (X, Y))
        theta = obj.parameters_vector()
        path = Path(torch.stack((theta, theta + 0.1, theta + 0.3)))
        losses = path_losses(obj, path, 3)["loss"]
        run = relax(
            obj,
            path,
            [0.2, 0.6],
            ProjectedSGD(1e-2, 2, steps=4),
            execution=Execution(backend=backend),
        )
        found.append((losses, run.loss))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other))


def test_settings_are_restored():
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    function = torch.compile(lambda x: x.sin(), backend=backend)
    with eager(), eager():
        function(torch.ones(2))
    assert not calls
    function(torch.ones(2))
    assert calls == [1]
    torch.compiler.reset()


def test_threads_share_the_setting():
    entered, leave, errors = threading.Event(), threading.Event(), []

    def work() -> None:
        try:
            with eager():
                entered.set()
                assert leave.wait(60)
                helper(torch.ones(2))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with eager():
        thread.start()
        assert entered.wait(60)
    helper_is_eager = torch.equal(helper(torch.zeros(1)), torch.zeros(1))
    leave.set()
    thread.join()
    assert helper_is_eager and not errors
    with pytest.raises(Exception, match="compiled"):
        helper(torch.ones(3))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexible_attention_is_refused_by_name():
    attention = pytest.importorskip("torch.nn.attention.flex_attention")

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.flex = nn.Linear(4, 3), compiled(attention.flex_attention)

        def forward(self, x: Tensor) -> Tensor:
            q = x.detach().view(-1, 1, 2, 2)
            return self.layer(self.flex(q, q, q).reshape(-1, 4))

    with pytest.raises(ValueError, match=r"flex_attention.*scaled_dot_product_attention"):
        Objective(Attends(), "cross_entropy", (X.float(), Y))
