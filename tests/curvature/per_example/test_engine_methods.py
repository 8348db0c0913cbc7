"""Models whose gradients are not all their layers': hooks, transforms, examples alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import by_name, relative_error
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.curvature import autograd_only, gradient_norms, ntk_gram, score_matrix
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.curvature.per_example.layer_rules.linear import OuterProductGrad
from entropic_fast.objective import Objective


def clip(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.02, 0.02)


def of_tensor(h: Tensor) -> None:
    h.register_hook(clip)


def of_node(h: Tensor) -> None:
    h.grad_fn.register_prehook(lambda gradients: (clip(gradients[0]),))


def of_edge(h: Tensor) -> None:
    edge = torch.autograd.graph.get_gradient_edge(h)
    edge.node.register_prehook(lambda gradients: (clip(gradients[0]),))


def nothing(h: Tensor) -> None:
    pass


class Hooked(nn.Module):
    """Two layers, and something done to the tensor between them."""

    def __init__(self, hook: Callable[[Tensor], None] = nothing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.hook = nn.Linear(6, 4), nn.Linear(4, 3), hook
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            self.hook(h)
        return self.b(h)


def of_module(model: nn.Module) -> Any:
    return model.b.register_full_backward_hook(lambda _, before, after: (clip(before[0]),))


def before_module(model: nn.Module) -> Any:
    return model.b.register_full_backward_pre_hook(lambda _, after: (clip(after[0]),))


def of_all_modules(model: nn.Module) -> Any:
    return nn.modules.module.register_module_full_backward_hook(
        lambda module, before, after: (
            (clip(before[0]),) if module.__class__ is nn.Linear and before[0] is not None else None
        )
    )


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The first two examples have gradients that no clipping changes."""
    torch.manual_seed(1)
    x, y = torch.randn(5, 6).double(), torch.randn(5, 3).double()
    y[:2] = model(x[:2]).detach() + 0.01
    return x, y


def explicit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Scores of a mean squared error by one backward pass an example.  # [N, P]"""
    rows = []
    for i in range(len(x)):
        # Twice, as torch's batch normalization needs.
        loss = (model(x[[i, i]]) - y[i]).square().mean(1)[0]
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("hook", [of_tensor, of_node, of_edge])
def test_hooks_on_tensors_change_the_scores_as_they_change_gradients(hook: Any):
    model = Hooked(hook)
    x, y = data(model)
    expected = explicit(model, x, y)
    plain = explicit(Hooked(), x, y)
    assert relative_error(expected[:2], plain[:2]) < 1e-14 < relative_error(expected, plain)
    assert relative_error(score_matrix(Objective(model, "mse", (x, y))), expected) < 1e-14


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("register", [of_module, before_module, of_all_modules])
def test_hooks_of_modules_change_the_scores_as_they_change_gradients(register: Any):
    model = Hooked()
    x, y = data(model)
    plain = explicit(model, x, y)
    handle = register(model)
    try:
        expected = explicit(model, x, y)
        assert relative_error(expected, plain) > 0.1
        got = score_matrix(Objective(model, "mse", (x, y)))
    finally:
        handle.remove()
    assert relative_error(got, expected) < 1e-14


def test_a_model_that_asks_for_gradients_and_hooks_nothing_goes_by_rule():
    model = Hooked()
    engine = PerExampleGradEngine(Objective(model, "mse", data(model)))
    assert engine.covered_by_layer_rule == set(engine.obj.parameter_names)


class NormTwice(nn.Module):
    """One normalization layer twice, then a sequence of positions with channels last."""

    def __init__(self, norm: nn.Module, outside: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.outside = outside  # of its weight besides
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3, padding=1), norm, nn.LayerNorm(4)
        for tensor in (norm.weight, norm.bias):
            nn.init.normal_(tensor)
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.norm(self.conv(x)))) * self.outside(self.norm.weight)
        return self.out(h.flatten(2).transpose(1, 2)).square().mean(1)[:, :3]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("covered_by_layer_rule", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ],
    ids=["batch", "instance", "instance, stored"],
)
def test_a_shared_norm_layer_is_right_for_chunks_of_any_size(
    norm: Any, covered_by_layer_rule: bool, size: int
):
    torch.manual_seed(0)
    model = NormTwice(norm(), (lambda weight: 1.0) if covered_by_layer_rule else Tensor.sum)
    x, y = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3).double()
    obj = Objective(model, "mse", (x, y), batch_size=size)
    assert PerExampleGradEngine(obj).batched == (
        set() if covered_by_layer_rule else {"norm.weight", "norm.bias"}
    )
    assert relative_error(score_matrix(obj), explicit(model, x, y)) < 1e-12


class InnerGradient(nn.Module):
    """A step down the gradient of an energy, by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x - torch.func.grad(lambda z: torch.tanh(self.a(z)).square().sum())(x))


def test_a_gradient_within_the_model_is_differentiated():
    torch.manual_seed(0)
    model, x, y = InnerGradient().double(), torch.randn(5, 6).double(), torch.randn(5, 3).double()
    obj, expected = Objective(model, "mse", (x, y)), explicit(model, x, y)
    assert relative_error(score_matrix(obj), expected) < 1e-13
    assert relative_error(gradient_norms(obj), expected.square().sum(1)) < 1e-13


def wrong_linear_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OuterProductGrad.write_columns

    def wrong(self: OuterProductGrad, begin: int, end: int, out: Tensor) -> None:
        right(self, begin, end, out)
        out.mul_(1.05)

    monkeypatch.setattr(OuterProductGrad, "write_columns", wrong)


def test_without_rules_a_disagreement_is_no_obstacle(monkeypatch: pytest.MonkeyPatch):
    obj, expected = by_name("dropout").objective(), score_matrix(by_name("dropout").objective())
    wrong_linear_rule(monkeypatch)
    with pytest.raises(ef.FastPathMismatchError, match=r"curvature\.autograd_only"):
        score_matrix(obj)
    with autograd_only():
        assert relative_error(score_matrix(obj), expected) < 1e-13
    with pytest.raises(ef.FastPathMismatchError):
        score_matrix(obj)


def test_another_loss_of_the_same_model_is_checked_again(monkeypatch: pytest.MonkeyPatch):
    obj = by_name("dropout").objective()
    gradient_norms(obj)
    wrong_linear_rule(monkeypatch)
    gradient_norms(obj)
    with pytest.raises(ef.FastPathMismatchError):
        ntk_gram(obj)


@pytest.mark.parametrize("quantity", ["matrix", "gram", "norms", "fisher"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_layer_whose_backward_pass_fails_half_way_is_gone_on_with(monkeypatch, quantity, after):
    """As torch's `slow_conv2d: grad_weight must be contiguous` of larger batches alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.arange(6) % 2
    take = {
        "matrix": score_matrix,
        "gram": ef.score_gram,
        "norms": gradient_norms,
        "fisher": lambda obj: torch.tensor(ef.fisher_trace(obj).value),
    }[quantity]
    expected = take(Objective(net, "cross_entropy", (x, y)))
    forward = PerExampleGradEngine._forward

    def failing(engine, batch, sink):
        handed = []

        def some(name, piece):
            if len(batch.inputs) > 2 and len(handed) == after:
                raise RuntimeError("slow_conv2d: grad_weight must be contiguous")
            handed.append(name)
            sink(name, piece)

        return forward(engine, batch, some)

    monkeypatch.setattr(PerExampleGradEngine, "_forward", failing)
    obj = Objective(net, "cross_entropy", (x, y))
    torch.testing.assert_close(take(obj), expected, rtol=1e-12, atol=1e-14)
    assert not PerExampleGradEngine(obj).traceable
