"""Models whose derivatives are not those of their operations: autograd's own, or a clear error."""

import re

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from entropic_fast._torch.full_precision import double_backward_fixes
from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    autograd_only,
    ggn_trace,
)
from entropic_fast.curvature.hvp._engine import HVPEngine
from entropic_fast.objective import Objective


class Rounded(torch.autograd.Function):
    """The straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class WrongSlope(torch.autograd.Function):
    """A backward pass that is not the derivative of the forward pass, in the newer style."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**4)


class Reversed(torch.autograd.Function):
    """Gradient reversal: nothing happens ahead."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Dispatched(torch.autograd.Function):
    """Calls operations by themselves, which modes for torch's functions do not see."""

    @staticmethod
    def forward(ctx, x):
        return torch.ops.aten.tanh(x)

    @staticmethod
    def backward(ctx, g):
        return 0.3 * g


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: 2 * g)
    return x.tanh()


def saved_hooks(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return x.exp()


def node_hooked(x: Tensor) -> Tensor:
    y = x.tanh()
    if y.requires_grad:
        y.grad_fn.register_prehook(lambda gs: (2 * gs[0],))
    return y


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean(1, keepdim=True)
    return x / scale


def from_numbers(x: Tensor) -> Tensor:
    return x * torch.tensor(torch.tanh(x).tolist(), dtype=x.dtype)


def own_gradient(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: y.tanh().pow(2).sum())(x)


def own_forward_mode(x: Tensor) -> Tensor:
    return torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1]


def bare_detach(x: Tensor) -> Tensor:
    return x * torch.ops.aten.detach(torch.tanh(x))


HIDDEN = {
    "straight-through estimator": (Rounded.apply, "autograd.Function"),
    "backward that is no derivative": (WrongSlope.apply, "autograd.Function"),
    "gradient reversal": (Reversed.apply, "autograd.Function"),
    "function of bare operations": (Dispatched.apply, "autograd.Function|backward pass of its own"),
    "estimator by detach": (lambda x: x + (torch.round(x) - x).detach(), r"Tensor\.detach"),
    "bare detach": (bare_detach, "detaches a tensor"),
    "data": (lambda x: x * torch.tanh(x).data, r"Tensor\.data"),
    "no_grad": (without_gradient, "runs without gradient"),
    "hook": (hooked, "register_hook"),
    "hook on a node": (node_hooked, "grad_fn"),
    "hooks on saved tensors": (saved_hooks, "hooks on saved tensors"),
    "numbers read back": (from_numbers, "tolist"),
    "gradient inside": (own_gradient, "derivatives of its own"),
}
SHOWN = {
    "forward mode inside": own_forward_mode,
    "vmap inside": lambda x: torch.vmap(lambda row: row.tanh() * row.sum())(x),
    "where": lambda x: torch.where(x > 0, x.clamp(min=1e-300).sqrt(), 0.3 * x),
}


class Inside(nn.Module):
    """A network with a function of its features, and of a weight."""

    def __init__(self, function, of_weight: bool = False) -> None:
        super().__init__()
        self.function, self.of_weight = function, of_weight
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.of_weight:
            weight = self.function(self.second.weight)
            return self.last(torch.tanh(nn.functional.linear(h, weight)))
        return self.last(self.function(self.second(h)))


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 1), nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.linear(x)) * self.scale**2).expand(-1, 3)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.second(torch.tanh(self.first(x)).view(-1, 3, 2)).permute(0, 2, 1)[..., ::2].sum(2)
        )


class Called(nn.Module):
    """Calls another module with weights that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = {name: torch.tanh(p) for name, p in self.inner.named_parameters()}
        return self.last(torch.tanh(torch.func.functional_call(self.inner, made, (x,))))


def parametrized() -> nn.Module:
    p = nn.utils.parametrizations
    return nn.Sequential(
        p.weight_norm(nn.Linear(4, 4)), nn.Tanh(), p.orthogonal(nn.Linear(4, 4)), nn.Tanh(),
        p.spectral_norm(nn.Linear(4, 3)),
    )  # fmt: skip


def penalized(outputs: Tensor, labels: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    return losses + 0.1 * outputs.square().sum(1)


def objective(model: nn.Module, seed: int = 0) -> Objective:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return Objective(model.double(), penalized, (x, torch.arange(7) % 3))


def built(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def assert_those_of_two_backward_passes(obj: Objective, theta: Tensor | None = None) -> None:
    """The Hessian by torch's autograd and nothing of the engine's."""
    leaf = obj.point(theta).clone().requires_grad_()
    ((_, inputs, targets),) = obj.batches()
    with double_backward_fixes():  # torch's weight normalization is wrong
        loss = obj.losses(leaf, inputs, targets).mean()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(len(leaf), 2, generator=generator, dtype=torch.float64)
    columns = [
        torch.autograd.grad(gradient, leaf, v, retain_graph=True, materialize_grads=True)[0]
        for v in vectors.T
    ]
    expected, operator = torch.stack(columns, 1), HessianOperator(obj, theta)
    assert float((operator @ vectors - expected).norm()) <= 1e-12 * float(expected.norm())
    forms = (vectors * expected).sum(0)
    assert torch.allclose(operator.quadratic_forms(vectors), forms, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("of_weight", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_graph_does_not_show_goes_to_autograd(name: str, of_weight: bool):
    function, why = HIDDEN[name]
    obj = objective(built(lambda: Inside(function, of_weight)))
    for kind in (HessianOperator, GGNOperator):
        way = kind(obj).method
        assert way.startswith("autograd: ")
    assert_those_of_two_backward_passes(obj)
    assert_those_of_two_backward_passes(obj, obj.parameters_vector() * 1.5)
    if not of_weight:
        assert re.search(why, way)


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_graph_shows_goes_by_rules(name: str):
    obj = objective(built(lambda: Inside(SHOWN[name])))
    assert HessianOperator(obj).method == "graph"
    assert_those_of_two_backward_passes(obj)
    assert_those_of_two_backward_passes(obj, obj.parameters_vector() * 1.5)


@pytest.mark.parametrize("make", [Expanded, Strided, Called, parametrized])
def test_views_as_outputs_and_made_weights_go_by_rules(make):
    obj = objective(built(make))
    assert HessianOperator(obj).method == "graph"
    assert_those_of_two_backward_passes(obj)


def test_a_function_in_a_forward_hook_goes_to_autograd():
    model = built(lambda: Inside(torch.tanh))
    model.second.register_forward_hook(lambda module, inputs, output: Reversed.apply(output))
    obj = objective(model)
    assert "autograd.Function" in HessianOperator(obj).method
    assert_those_of_two_backward_passes(obj)


def test_numbers_written_into_the_graph_are_noticed():
    """Values that tracing does not follow are constants of the graph, right at one point only."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with disable_proxy_modes_tracing():
                scale = self.linear.weight.sum() * 1.0
            return self.linear(x) * scale

    obj = objective(built(Remembers))
    assert HessianOperator(obj).method == (
        "autograd: the graph holds values of one point as constants"
    )
    assert_those_of_two_backward_passes(obj)
    assert_those_of_two_backward_passes(obj, obj.parameters_vector() * 1.5)


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_function_without_second_derivative_is_refused(kind: type):
    """torch would leave its part out, without a word."""
    obj = objective(built(lambda: Inside(Once.apply)))
    operator = kind(obj)
    assert "autograd.Function" in operator.method
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        operator @ torch.ones(obj.num_params, dtype=torch.float64)


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_loss_without_second_derivative_is_refused(kind: type):
    x = torch.ones(3, 4, dtype=torch.float64)
    obj = Objective(
        nn.Linear(4, 1).double(), lambda outputs, y: Once.apply(outputs)[:, 0] ** 2, (x, x)
    )
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        kind(obj) @ torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        ggn_trace(obj)


def test_the_jacobian_of_a_function_without_second_derivative():
    """Its transpose needs a first derivative only."""
    obj = objective(built(lambda: Inside(Once.apply)))
    jacobian = JacobianOperator(obj)
    leaf = obj.parameters_vector().requires_grad_()
    outputs = obj.outputs(leaf, obj.tensors()[0])
    u = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64)
    (expected,) = torch.autograd.grad(outputs, leaf, u.view_as(outputs))
    assert torch.allclose(jacobian.T @ u, expected, rtol=1e-12)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        jacobian @ leaf.detach()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_part_runs_as_it_was_written():
    """torch's own double backward pass does not go through what it compiled."""
    plain, model = built(lambda: Inside(torch.tanh)), built(lambda: Inside(torch.tanh))
    model.function = torch.compile(torch.tanh, backend="aot_eager")
    obj = objective(model)
    v = torch.linspace(-1, 1, obj.num_params, dtype=torch.float64)
    assert torch.allclose(HessianOperator(obj) @ v, HessianOperator(objective(plain)) @ v)


class Checkpointed(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i == self.depth:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
            else:
                x = layer(x)
        return self.last(torch.tanh(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("depth", [0, 1])
def test_reentrant_checkpoints_are_refused(depth: int):
    """At depth 0 they would give no gradient in the layer, with a warning; deeper, an error."""
    with pytest.raises(ValueError, match=r"got torch\.utils\.checkpoint"):
        objective(built(lambda: Checkpointed(depth)))


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_graph_that_gives_nan_where_autograd_does_not_is_not_used(
    kind: type, monkeypatch: pytest.MonkeyPatch
):
    x = torch.randn(4, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 7)).double()
    obj = Objective(model, "mse", (x, torch.randn(4, 7, dtype=torch.float64)))
    vector = torch.randn(obj.num_params, dtype=torch.float64)
    with autograd_only():
        expected = kind(obj) @ vector
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    monkeypatch.setattr(HVPEngine, "products", lambda self, rows, *_: nan.expand_as(rows))
    operator = kind(obj)
    assert "NaN" in operator.method
    torch.testing.assert_close(operator @ vector, expected)
