"""Models that are no function of the parameters given, refused with what to do instead."""

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
