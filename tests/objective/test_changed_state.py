"""Models whose forward pass changes their state, in evaluation mode too: they stay functions."""

import copy

import pytest
import torch
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.objective import Objective

X, Y = torch.linspace(-1, 1, 24).view(6, 4).double(), torch.arange(6) % 3


class Counting(nn.Linear):
    """Counts its calls, after three of which its outputs change."""

    def __init__(self, buffer: bool) -> None:
        torch.manual_seed(0)
        super().__init__(4, 3)
        if buffer:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        else:
            self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 if int(self.calls) < 4 else 2)


class Iterating(nn.Linear):
    """A spectral norm that makes a power iteration at each call."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(0)
        super().__init__(4, 3)
        self.how = how
        self.register_buffer("u", nn.functional.normalize(torch.randn(3), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            v = nn.functional.normalize(self.weight.T @ self.u, dim=0)
            u = nn.functional.normalize(self.weight @ v, dim=0)
            if self.how == "in place":
                self.u.copy_(u)
            elif self.how == "data":
                self.u.data = u
            else:
                self.u = u
        return nn.functional.linear(x, self.weight / (u @ self.weight @ v), self.bias)


@pytest.mark.parametrize("how", ["in place", "assigned", "data"])
def test_an_iteration_begins_where_the_given_model_is(how: str):
    model = Iterating(how).double()
    obj = Objective(model, "cross_entropy", (X, Y), batch_size=4)
    first = obj.loss()
    assert first == obj.loss()
    assert torch.equal(obj.buffers["u"], model.u)
    identity = torch.eye(15).double()
    twin = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(twin(X), Y)
    gradient = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    assert torch.allclose(obj.gradient(), flat.detach(), atol=1e-12)
    rows = [torch.autograd.grad(g, list(twin.parameters()), retain_graph=True) for g in flat]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for _ in range(2):
        assert torch.allclose(ef.HessianOperator(obj) @ identity, hessian, atol=1e-10)
        assert torch.allclose(ef.score_matrix(obj).mean(0), flat.detach(), atol=1e-12)
    assert obj.loss() == first
    assert obj.double().loss() == first


@pytest.mark.parametrize("buffer", [True, False])
def test_a_count_stands_still(buffer: bool):
    model = Counting(buffer).double()
    obj = Objective(model, "cross_entropy", (X, Y), batch_size=2)
    plain = nn.Linear(4, 3).double()
    plain.load_state_dict({n: p for n, p in model.named_parameters()})
    expected = Objective(plain, "cross_entropy", (X, Y))
    for _ in range(3):
        assert obj.loss() == pytest.approx(expected.loss(), rel=1e-13)
        assert torch.allclose(obj.gradient(), expected.gradient(), atol=1e-14)
    path = ef.linear_path(obj.parameters_vector(), obj.parameters_vector() + 0.1, 3)
    runs = [
        ef.relax(o, path, 0.5, ef.ProjectedSGD(0.1, 3, steps=5), replicas=2).position
        for o in (obj, expected)
    ]
    assert torch.allclose(runs[0], runs[1], atol=1e-12)
    with pytest.raises(ValueError, match=r"backend: .*a state that a forward pass changes"):
        ef.relax(
            obj,
            path,
            0.5,
            ef.ProjectedSGD(0.1, 3, steps=5),
            execution=ef.Execution(backend="threads"),
        )
    assert int(model.calls) == 0 and int(obj.module.calls) == 0
    assert not buffer or int(obj.buffers["calls"]) == 0


class Remembering(nn.Module):
    """Begins with the hidden state of its last call, and keeps what it computed."""

    def __init__(self, begin: Tensor | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.state = begin

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.state is not None:
            h = h + self.state.mean(0)
        self.state = torch.tanh(h)
        self.kept = [self.state]
        return self.last(self.state)


@pytest.mark.parametrize("begin", [None, torch.ones(2, 4).double()])
def test_a_hidden_state_is_that_of_the_given_model(begin: Tensor | None):
    obj = Objective(Remembering(begin), "cross_entropy", (X, Y), batch_size=4)
    twin = Remembering(begin)
    expected = nn.functional.cross_entropy(twin(X), Y)
    gradient = torch.autograd.grad(expected, list(twin.parameters()))
    flat = torch.cat([g.flatten() for g in gradient])
    for now in (obj, obj.cast(torch.float32).double(), obj.with_norm("batch")):
        for _ in range(2):
            assert now.loss() == pytest.approx(float(expected.detach()), rel=1e-6)
            assert torch.allclose(now.gradient(), flat, atol=1e-6)
        assert torch.allclose(ef.score_matrix(now).mean(0), flat, atol=1e-6)
        assert ef.HessianOperator(now).method == "graph"
        assert not hasattr(now.module, "kept")
        assert (now.module.state is None) == (begin is None)
