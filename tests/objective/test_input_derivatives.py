"""Models and losses that take derivatives in their inputs: everything against differences."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import entropic_fast as ef
from entropic_fast._torch.derivative_formulas import FORMULAS
from entropic_fast.dynamics.projected_sgd._thread_pool import ThreadPoolGradients

STEP = 1e-5


def by_autograd(net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return slope.flatten(1) + u.flatten(1).sum(1, keepdim=True)


def laplacian(net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        bends = [
            torch.autograd.grad(g.sum(), x, create_graph=True)[0].flatten(1)[:, i]
            for i, g in enumerate(slope.flatten(1).T)
        ]
    return torch.stack(bends).sum(0)[:, None] + u.flatten(1).sum(1, keepdim=True)


def by_backward(net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.functional.jvp(net, x, torch.ones_like(x), create_graph=True)[1]


def by_func_grad(net, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: net(x).sum())(x).flatten(1)


def by_vmap(net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda x: net(x[None]).sum()))(x).flatten(1)


def by_jacrev(net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(x).flatten(1)


def by_jvp(net, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (torch.ones_like(x),))[1].flatten(1)


def by_hessian(net, x: Tensor) -> Tensor:
    matrices = torch.func.vmap(torch.func.hessian(lambda x: net(x[None]).sum()))(x)
    return matrices.reshape(len(x), -1)


def by_dual_numbers(net, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.cos(x)))).tangent


INNER = {
    f.__name__: f
    for f in (
        by_autograd, laplacian, by_backward, by_func_grad, by_vmap, by_jacrev, by_jvp, by_hessian,
        by_dual_numbers,
    )
}  # fmt: skip


class Sum(nn.Module):
    """Called as torch.layer_norm, without a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, [4], eps=1e-3) + F.layer_norm(2 * x, (4,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.view(len(x), 1, 4) * torch.tensor([[1.0], [0.5]]).to(x)).mean(1)


def mlp(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), middle, nn.SiLU(), nn.Linear(4, 1))


def images(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 4, 2, padding=1), middle, nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 1),
    )  # fmt: skip


NETS = {
    "LayerNorm": lambda: mlp(nn.LayerNorm(4)),
    "LayerNorm by functions": lambda: mlp(Sum()),
    "RMSNorm": lambda: mlp(nn.RMSNorm(4)),
    "GroupNorm": lambda: images(nn.GroupNorm(2, 4)),
    "InstanceNorm": lambda: images(nn.InstanceNorm2d(4, affine=True)),
    "BatchNorm": lambda: images(nn.BatchNorm2d(4)),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "ConvTranspose with output padding": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)),
        nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 1),
    ),
    "SiLU in place": lambda: mlp(nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True))),
    "Mish in place": lambda: mlp(nn.Sequential(nn.Linear(4, 4), nn.Mish(inplace=True))),
    "attention": lambda: mlp(Attention()),
    "Hardsigmoid": lambda: mlp(nn.Sequential(nn.LayerNorm(4), nn.Hardsigmoid())),
}


class Inner(nn.Module):
    def __init__(self, net: nn.Module, derivative) -> None:
        super().__init__()
        self.net, self.derivative = net, derivative

    def forward(self, x: Tensor) -> Tensor:
        return self.derivative(self.net, x)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets[:, None]).square().sum(1)


def objective(net: str, how: str, norm: str = "running", n: int = 5) -> ef.Objective:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Inner(NETS[net](), INNER[how]).double()
        x, y = torch.randn(n, 2).double(), torch.randn(n).double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return ef.Objective(model, squares, (x, y), norm=norm)


def assert_right(obj: ef.Objective) -> None:
    """Gradient and products against differences, and everything else against the Hessian."""
    theta = obj.parameters_vector()
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(1)).double()
    ends = [theta + sign * STEP * v for sign in (1, -1)]
    slope = (obj.loss(ends[0]) - obj.loss(ends[1])) / (2 * STEP)
    assert slope == pytest.approx(float(obj.gradient() @ v), rel=1e-6, abs=1e-8)
    expected = (obj.gradient(ends[0]) - obj.gradient(ends[1])) / (2 * STEP)
    operator = ef.HessianOperator(obj)
    assert relative_error(operator @ v, expected) < 1e-6
    full = operator @ torch.eye(len(theta)).double()
    assert relative_error(full, full.T) < 1e-10
    assert relative_error(operator.quadratic_forms(v[:, None]), (v @ full @ v)[None]) < 1e-9


@pytest.mark.parametrize("how", INNER)
def test_the_hessian_of_a_model_with_an_input_derivative(how: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, when its forward mode is first used
        assert_right(objective("LayerNorm", how))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("how", ["by_autograd", "laplacian"])
def test_the_hessian_with_each_layer(net: str, how: str):
    if (net, how) == ("attention", "laplacian"):
        pytest.skip("20 s, by operations that the others have")
    assert_right(objective(net, how))


@pytest.mark.parametrize("net", ["BatchNorm", "InstanceNorm"])
def test_statistics_of_the_batch(net: str):
    """A gradient penalty on a critic in training, of which torch has no third derivative."""
    assert_right(objective(net, "by_autograd", norm="batch"))


def test_all_quantities_of_one_objective():
    obj = objective("LayerNorm", "by_autograd")
    size = obj.num_params
    full = ef.HessianOperator(obj) @ torch.eye(size).double()
    diagonal = ef.hessian_diagonal(obj, probes=32)
    assert bool(((diagonal.value - full.diagonal()).abs() <= 6 * diagonal.std_error + 1e-9).all())
    trace = ef.hessian_trace(obj, probes=size, method="hutch++")
    assert trace.value == pytest.approx(float(full.trace()), rel=1e-8)
    top = ef.top_eigenvalues(ef.HessianOperator(obj), k=1)
    assert float(top.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-3)
    J = ef.JacobianOperator(obj) @ torch.eye(size).double()
    x, _ = obj.tensors()
    theta, units = obj.parameters_vector(), torch.eye(size).double()
    columns = [
        (obj.outputs(theta + STEP * e, x) - obj.outputs(theta - STEP * e, x)).flatten()
        for e in units
    ]
    assert relative_error(J, torch.stack(columns, 1).detach() / (2 * STEP)) < 1e-6
    G = ef.GGNOperator(obj) @ units
    assert relative_error(G, 2 * J.T @ J / obj.num_examples) < 1e-8
    assert ef.ggn_trace(obj).value == pytest.approx(float(G.trace()), rel=1e-8)
    scores = ef.score_matrix(obj)
    assert relative_error(scores.mean(0), obj.gradient()) < 1e-8


@pytest.mark.parametrize("how", ["by_jvp", "by_dual_numbers"])
def test_scores_of_models_in_forward_mode(how: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        obj = objective("LayerNorm", how)
        assert relative_error(ef.score_matrix(obj).mean(0), obj.gradient()) < 1e-10


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(2, 0, 1), (3, 1, 2), (1, 2, 3)])
def test_transposed_convolutions_are_those_of_torch(
    axes: int, stride: int, padding: int, dilation: int
):
    function = getattr(F, f"conv_transpose{axes}d")
    x, w = torch.randn(2, 4, *[4] * axes).double(), torch.randn(4, 3, *[3] * axes).double()
    for extra in range(max(stride, dilation)):
        for bias in (None, torch.randn(6).double()):
            options = {"stride": stride, "padding": padding, "output_padding": extra}
            given = (x, w, bias), {**options, "groups": 2, "dilation": dilation}
            mine = FORMULAS[function](*given[0], **given[1])
            assert torch.allclose(mine, function(*given[0], **given[1]), atol=1e-12)


def test_gradients_of_replicas_with_a_second_input_derivative():
    """A third derivative in the gradient itself."""
    obj = objective("LayerNorm", "laplacian")
    theta, (x, y) = obj.parameters_vector(), obj.tensors()
    gradients = ThreadPoolGradients(obj, 2)
    _, rows = gradients(theta.repeat(2, 1), x.expand(2, -1, -1), y.expand(2, -1))
    gradients.close()
    assert relative_error(rows, obj.gradient().expand(2, -1)) < 1e-12


class Solution(nn.Module):
    """Leaves the derivative to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.LayerNorm(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return {"u": self.net(x), "x": x}


def residual(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    with torch.enable_grad():
        u, x = outputs["u"], outputs["x"]
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
    return (slope[:, 1] - 0.1 * bend[:, 0] + u[:, 0] - targets).square()


def test_a_loss_that_takes_the_derivative():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        data = torch.randn(5, 2).double(), torch.randn(5).double()
        obj = ef.Objective(Solution().double(), residual, data)
    assert obj.takes_derivatives
    assert_right(obj)


class Forces(nn.Module):
    """Minus the gradient of an energy of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.SiLU(), nn.RMSNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU(),
            nn.Linear(6, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        i, j = torch.triu_indices(3, 3, 1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(torch.cdist(x, x)[:, i, j])
            return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_forces_that_are_matched():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        data = torch.randn(4, 3, 3).double(), torch.randn(4, 3, 3).double()
        assert_right(ef.Objective(Forces().double(), "mse", data))


@pytest.mark.parametrize("net", ["BatchNorm", "InstanceNorm", "GroupNorm"])
def test_a_gradient_penalty_on_images(net: str):
    def penalized(critic, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            score = critic(x)
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score - 10 * (slope.flatten(1).norm(2, dim=1, keepdim=True) - 1) ** 2

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Inner(NETS[net](), penalized).double()
        data = torch.randn(5, 2).double(), torch.zeros(5).double()
        assert_right(ef.Objective(model, lambda outputs, _: -outputs[:, 0], data, norm="batch"))


def test_a_model_without_input_derivative_keeps_torchs_layers():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        obj = ef.Objective(mlp(nn.LayerNorm(4)), "mse", (torch.randn(5, 2), torch.randn(5, 1)))
    assert not obj.takes_derivatives
    assert ef.HessianOperator(obj).method == "graph"


def test_a_vmap_alone_is_no_derivative():
    net = Inner(mlp(nn.LayerNorm(4)), lambda net, x: torch.vmap(lambda row: net(row[None])[0])(x))
    assert not ef.Objective(net, "mse", (torch.randn(5, 2), torch.randn(5, 1))).takes_derivatives


def test_a_function_that_torch_takes_for_a_constant_is_refused():
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.special.bessel_j0(self.linear(x))

    with pytest.raises(ValueError, match=r"torch\.special\.bessel_j0"):
        ef.Objective(Bessel(), "mse", (torch.randn(5, 2), torch.randn(5, 1)))


def test_a_layer_with_a_wrong_gradient_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.CrossMapLRN2d(3), nn.Flatten(), nn.Linear(16, 1))
    with pytest.raises(ValueError, match="CrossMapLRN2d"):
        ef.Objective(net, "mse", (torch.randn(5, 1, 2, 2), torch.randn(5, 1)))


class Energy(nn.Module):
    """The force of an energy, to which a bias adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.linear(x) + x.pow(3)
            return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_parameters_that_a_derivative_loses_are_refused_alone():
    x = torch.randn(5, 2).double()
    with pytest.raises(ValueError, match="depends on the trainable parameters"):
        ef.Objective(Energy(), "mse", (x, x), parameters="linear.bias")
    obj = ef.Objective(Energy(), "mse", (x, x))
    assert float(obj.gradient()[2]) == 0.0
    assert obj.num_params == 3
