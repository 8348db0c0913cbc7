"""Models that are no function of the parameters given, refused with what to do instead."""

import functools
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

from entropic_fast.objective import Objective

X, Y = torch.linspace(-1, 1, 20).view(5, 4), torch.arange(5) % 3


class Clamped(nn.Linear):
    """Keeps its weight within bounds, which it may be within already."""

    def __init__(self, bound: float, how: str) -> None:
        torch.manual_seed(0)
        super().__init__(4, 3)
        self.bound, self.how = bound, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data":
            self.weight.data.clamp_(-self.bound, self.bound)
        elif self.how == "no_grad":
            with torch.no_grad():
                self.weight.clamp_(-self.bound, self.bound)
        elif self.how == "nonnegative":
            self.weight.data.relu_()
        elif self.how == "copy":
            return nn.functional.linear(x, self.weight.clamp(-self.bound, self.bound), self.bias)
        return super().forward(x)


@pytest.mark.parametrize("bound", [0.1, 1.0])  # beyond it now; only at other points
@pytest.mark.parametrize("how", ["data", "no_grad", "nonnegative"])
def test_a_model_that_writes_its_parameters_is_refused_and_they_stay(bound: float, how: str):
    model = Clamped(bound, how)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"model: expected a forward pass that only reads"):
        Objective(model, "cross_entropy", (X, Y))
    assert torch.equal(model.weight, before)


def test_a_constrained_copy_of_the_weight_is_fine():
    obj = Objective(Clamped(0.1, "copy"), "cross_entropy", (X, Y))
    theta = obj.parameters_vector()
    kept = theta.clone()
    obj.gradient(theta)
    assert torch.equal(theta, kept)


def test_an_embedding_with_max_norm_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"model: .* max_norm of nn\.Embedding"):
        Objective(model, "cross_entropy", (torch.arange(10).view(5, 2) % 9, Y))


def test_a_model_that_cannot_run_far_away_is_taken():
    class Careful(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if float(self.weight.detach().abs().max()) > 10:
                raise ArithmeticError("out of range")
            return super().forward(x)

    assert Objective(Careful(4, 3), "cross_entropy", (X, Y)).loss() > 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_modules_compiled_by_torchscript_are_refused(how: str, whole: bool):
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        compiled = torch.jit.script(layers) if how == "script" else torch.jit.trace(layers, X)
    model = compiled if whole else nn.Sequential(compiled, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"model: .* pass the module that it was made from"):
        Objective(model, "cross_entropy", (X, Y))


# -- what a copy cannot follow --------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _closure(layer: nn.Linear):
    return lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def _by_closure(model: nn.Sequential) -> None:
    model[0].forward = _closure(model[0])


def _by_hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, inputs, output: output * model[0].bias.mean())


@pytest.mark.parametrize("change", [_by_closure, _by_hook])
def test_a_function_that_holds_the_model_is_refused(change):
    model = network()
    change(model)
    with pytest.raises(ValueError, match=r"holds the model itself and uses its '0\.(weight|bias)'"):
        Objective(model, "cross_entropy", (X, Y))


def test_a_function_that_holds_a_frozen_model_is_refused_where_that_is_chosen():
    model = network().requires_grad_(False)
    _by_closure(model)
    with pytest.raises(ValueError, match="holds the model itself"):
        Objective(model, "cross_entropy", (X, Y), parameters="*")
    assert not any(p.requires_grad for p in model.parameters())
    assert Objective(model, "cross_entropy", (X, Y), parameters="2").num_params == 18


@pytest.mark.parametrize("bind", [types.MethodType, functools.partial])
def test_a_forward_that_is_bound_to_its_module_is_fine(bind):
    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    model = network()
    model[0].forward = bind(forward, model[0])
    obj = Objective(model, "cross_entropy", (X, Y))
    assert torch.equal(obj.gradient(), Objective(network(), "cross_entropy", (X, Y)).gradient())


def test_a_penalty_on_the_parameters_of_the_given_model_is_refused():
    model = network()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(outputs, targets, reduction="none") + penalty

    with pytest.raises(ValueError, match="penalty on the parameters to weight_decay="):
        Objective(model, loss, (X, Y))


def test_a_loss_with_parameters_of_its_own_is_fine():
    scale = nn.Parameter(torch.tensor(2.0))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * nn.functional.cross_entropy(outputs, targets, reduction="none")

    plain = Objective(network(), "cross_entropy", (X, Y))
    assert Objective(network(), loss, (X, Y)).loss() == pytest.approx(2 * plain.loss())


def test_parameters_that_the_first_forward_pass_creates_are_refused():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "last"):
                torch.manual_seed(0)
                self.last = nn.Linear(4, 3)
            return self.last(self.first(x))

    model = Late()
    with pytest.raises(
        ValueError, match=r"got 'last\.weight', which it created; run the model once"
    ):
        Objective(model, "cross_entropy", (X, Y))
    model(X)
    assert Objective(model, "cross_entropy", (X, Y)).num_params == 35


def test_sparse_parameters_and_functions_are_refused_by_name():
    model = network()
    model.register_parameter("graph", nn.Parameter(torch.eye(3).to_sparse()))
    with pytest.raises(ValueError, match=r"dense parameters, got 'graph' of layout torch\.sparse"):
        Objective(model, "cross_entropy", (X, Y))
    with pytest.raises(ValueError, match=r"an nn\.Module, got the function .*put a function into"):
        Objective(_closure(network()[0]), "cross_entropy", (X, Y))


def test_a_module_in_two_places_is_taken():
    """torch's functional call leaves the tensors it was given in such a module."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer))
    obj = Objective(model, "mse", (torch.randn(4, 3), torch.randn(4, 3)))
    assert obj.num_params == 12
