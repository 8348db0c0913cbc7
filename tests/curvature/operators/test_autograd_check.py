"""Second derivatives that autograd has wrong are noticed on first use; those at kinks are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropic_fast as ef
from entropic_fast._torch import derivative_formulas as derivatives
from entropic_fast.curvature import autograd_only
from entropic_fast.curvature.operators import _autograd_check as first_use


class Forgetful(torch.autograd.Function):
    """tanh, whose backward pass keeps its output where autograd cannot see it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x)
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * (1 - ctx.y**2)


class Scaled(torch.autograd.Function):
    """A backward pass that is right, in which autograd finds half of its derivative in g."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 1.5 * (g + g.detach())


class Lopsided(torch.autograd.Function):
    """x * y with a backward pass of which autograd sees the first half alone."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return g * y, g * x.detach()


class Net(nn.Module):
    def __init__(self, function, bias: bool = True) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(3, 6, bias=bias), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def lopsided(h: Tensor) -> Tensor:
    return Lopsided.apply(h, h.roll(1, 1).sin())


def objective(function, loss="mse", dtype=torch.float64, bias: bool = True) -> ef.Objective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(function, bias).to(dtype)
        x, y = torch.randn(12, 3).to(dtype), torch.randn(12, 2).to(dtype)
    return ef.Objective(model, loss, (x, y))


def ones(obj: ef.Objective) -> Tensor:
    return torch.ones(obj.num_params, dtype=obj.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [Forgetful.apply, lopsided])
def test_a_wrong_double_backward_pass_is_named(function, dtype: torch.dtype):
    obj = objective(function, dtype=dtype)
    with pytest.raises(ef.WrongDerivativeError, match=r"ForgetfulBackward|LopsidedBackward"):
        ef.HessianOperator(obj) @ ones(obj)
    ef.GGNOperator(obj) @ ones(obj)  # which needs first derivatives alone


def test_a_wide_network_of_kinks():
    """Every step crosses some of them."""

    def network(function) -> ef.Objective:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [m for _ in range(3) for m in (nn.Linear(200, 200), nn.ReLU())]
            net = nn.Sequential(nn.Linear(3, 200), *layers, nn.Linear(200, 2))
            data = torch.randn(12, 3).double(), torch.randn(12, 2).double()
            model = nn.Sequential(Net(function), nn.Linear(2, 3), net)
            return ef.Objective(model.double(), "mse", data)

    wrong, right = network(Forgetful.apply), network(lambda h: h.tanh() + 0 * h.detach())
    with pytest.raises(ef.WrongDerivativeError, match="Forgetful"):
        ef.HessianOperator(wrong) @ ones(wrong)
    ef.HessianOperator(right) @ ones(right)


USES = {
    "forms": lambda obj: ef.HessianOperator(obj).quadratic_forms(ones(obj)[:, None]),
    "trace": ef.hessian_trace,
    "diagonal": ef.hessian_diagonal,
    "top": lambda obj: ef.top_eigenvalues(ef.HessianOperator(obj), k=1),
    "density": lambda obj: ef.spectral_density(
        ef.HessianOperator(obj), ef.DensitySettings(steps=5)
    ),
    "unchecked": lambda obj: ef.HessianOperator(obj).unchecked(ones(obj)),
    "network": lambda obj: (ef.HessianOperator(obj) - ef.GGNOperator(obj)).quadratic_forms(
        ones(obj)[:, None]
    ),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_uses_products_is_stopped(use: str):
    with pytest.raises(ef.WrongDerivativeError):
        USES[use](objective(Forgetful.apply))


def test_products_as_they_come_are_to_be_had():
    obj = objective(Forgetful.apply)
    with autograd_only():
        operator = ef.HessianOperator(obj)
    assert bool(torch.isfinite(operator @ ones(obj)).all())


@pytest.mark.parametrize("kind", [ef.GGNOperator, ef.JacobianOperator, ef.HessianOperator])
def test_a_backward_pass_that_is_not_linear_in_its_gradient(kind: type):
    obj = objective(Scaled.apply)
    with pytest.raises(ef.WrongDerivativeError, match="random u and v"):
        kind(obj) @ ones(obj)


@pytest.mark.parametrize("kind", [ef.GGNOperator, ef.HessianOperator])
def test_a_loss_with_a_wrong_second_derivative_beside_a_right_model(kind: type):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return Forgetful.apply(outputs - targets).square().sum(1)

    obj = objective(torch.tanh, loss)
    with pytest.raises(ef.WrongDerivativeError, match="loss"):
        kind(obj) @ ones(obj)
    with pytest.raises(ef.WrongDerivativeError, match="loss"):
        ef.ggn_trace(obj)


def test_torchs_own_third_derivative_of_layer_normalization(monkeypatch):
    """As if it were not worked around."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        obj = ef.Objective(Slope().double(), "mse", (torch.randn(9, 3), torch.randn(9, 3).double()))
    assert obj.takes_derivatives
    ef.HessianOperator(obj) @ ones(obj)
    monkeypatch.setattr(derivatives, "FORMULAS", {})
    first_use._tested.clear()
    with pytest.raises(ef.WrongDerivativeError, match="torch itself"):
        ef.HessianOperator(obj) @ ones(obj)


def at_kinks(h: Tensor) -> Tensor:
    return F.relu(h * torch.tensor([0.0, 1, 0, 1, 1, 0]).to(h)) + F.hardswish(3 * h) + h.abs()


def stopped(h: Tensor) -> Tensor:
    return h * torch.tanh(h).detach() + (torch.round(h) - h).detach()


def rough(h: Tensor) -> Tensor:
    """A square root near 0, where differences say nothing."""
    return (h.detach() - h + 1e-11).abs().sqrt() + torch.sin(1e4 * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [at_kinks, stopped, rough, F.relu, nn.Softshrink(0.1)])
@pytest.mark.parametrize("loss", ["mse", lambda a, b: F.huber_loss(a, b, reduction="none").sum(1)])
def test_what_is_not_smooth_or_no_gradient_by_intention_is_let_pass(function, loss, dtype):
    def hidden(h: Tensor) -> Tensor:
        return function(h) + (h - h.detach())  # not by the graph

    obj = objective(hidden, loss, dtype, bias=False)
    for kind in (ef.HessianOperator, ef.GGNOperator):
        operator = kind(obj)
        assert operator.method.startswith("autograd")
        operator @ ones(obj)


def test_products_are_tested_once_for_a_model_and_a_loss(monkeypatch):
    tested = []
    test = first_use._test_products
    monkeypatch.setattr(
        first_use, "_test_products", lambda operator: (tested.append(operator.kind), test(operator))
    )
    obj = objective(lambda h: h.detach() * h)
    for point in (obj.parameters_vector(), 2 * obj.parameters_vector()):
        operator = ef.HessianOperator(obj, point)
        operator @ ones(obj)
        operator @ ones(obj)
    assert tested == ["hessian"]
    ef.HessianOperator(objective(torch.tanh)) @ ones(obj)  # by the graph
    assert tested == ["hessian"]


class Normalized(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(F.batch_norm(h * h.detach(), None, None, training=True))


def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs @ outputs.T).logsumexp(1).mean() + outputs.square().mean()


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("mse", {"weight_decay": 0.3}),
        (contrast, {"coupled": True}),
        (contrast, {"coupled": True, "weight_decay": 0.3}),
    ],
)
def test_decay_and_examples_that_mix_are_no_wrong_derivatives(loss, settings: dict):
    """Products by autograd agree with differences of the objective's own gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
        net = (
            Normalized(None)
            if settings.get("coupled")
            else Net(lambda h: h.tanh() + 0 * h.detach())
        )
    obj = ef.Objective(net.double(), loss, (x, y), **settings)
    operator = ef.HessianOperator(obj)
    assert operator.method.startswith("autograd")
    assert bool(torch.isfinite(operator @ ones(obj)).all())
    with pytest.raises(ef.WrongDerivativeError):
        wrong = ef.Objective(Net(Forgetful.apply).double(), loss, (x, y), **settings)
        ef.HessianOperator(wrong) @ ones(wrong)
