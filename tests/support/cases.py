"""Models on which tools for per-example gradients and curvature have been wrong, with data.

Every case is small (P under about 200), deterministic, and built in float64; `objective` gives
it as an Objective. The oracles below use the module itself, plain backward passes and central
differences: neither functional calls nor second derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropic_fast.objective import Objective


@dataclass(frozen=True)
class Case:
    """A model, a loss and data, made anew (and alike) at each call of `build`."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    classes: int = 3
    vocabulary: int = 0  # inputs are integers below it, if not 0
    # torch's fused float32 LSTM has no second derivative on the CPU.
    double_backward_in: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def build(self, examples: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
        """The model in evaluation mode, inputs [N, ...] and targets [N]."""
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, self.name)))
            model = self.make().double().eval()
            if self.vocabulary:
                inputs = torch.randint(0, self.vocabulary, (examples, *self.shape))
            else:
                inputs = torch.randn(examples, *self.shape, dtype=torch.float64)
            targets = torch.randint(0, self.classes, (examples,))
        return model, inputs, targets

    def objective(
        self, examples: int = 7, dtype: torch.dtype = torch.float64, batch_size: int | None = 4
    ) -> Objective:
        model, inputs, targets = self.build(examples)
        return Objective(model.to(dtype), "cross_entropy", (inputs, targets), batch_size=batch_size)


class Head(nn.Module):
    """Features by another module, averaged over all but the first two axes, then a linear map."""

    def __init__(self, features: nn.Module, width: int, activation: nn.Module | None = None):
        super().__init__()
        self.features, self.out = features, nn.Linear(width, 3)
        self.activation = activation or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.features(x))
        return self.out(h.flatten(2).mean(2) if h.ndim > 2 else h)


def _zero_gamma() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 0.7, 0.0]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return Head(nn.Sequential(nn.Conv2d(2, 3, 3), norm), 3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, activation="gelu")
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


class Residual(nn.Module):
    """A residual block whose activations overwrite their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(2, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.relu(self.norm(self.first(x))))
        h += x
        return self.out(torch.relu_(h).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) @ self.matrix * self.temperature


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(x).mean(1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Branching(nn.Module):
    """Control flow that depends on the data: no vmap can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.a(r) if float(r.sum()) > 0 else torch.tanh(self.b(r)) for r in x]
        return torch.stack(rows)


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


CASES = [
    Case("grouped conv", lambda: Head(nn.Conv2d(4, 6, 3, groups=2), 6), (4, 5, 5)),
    Case("depthwise conv", lambda: Head(nn.Conv2d(3, 6, 3, groups=3, stride=2), 6), (3, 6, 5)),
    Case(
        "padding same",
        lambda: Head(nn.Conv2d(2, 3, (3, 5), padding="same", dilation=2), 3),
        (2, 5, 6),
    ),
    Case(
        "circular padding",
        lambda: Head(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3),
        (2, 4, 5),
    ),
    Case(
        "transposed conv",
        lambda: Head(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), 3),
        (2, 3, 3),
    ),
    Case("conv 1d strided", lambda: Head(nn.Conv1d(2, 3, 4, stride=3, dilation=2), 3), (2, 11)),
    Case("batch norm gamma 0", _zero_gamma, (2, 5, 5)),
    Case(
        "group norm",
        lambda: Head(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), 4),
        (2, 5, 5),
    ),
    Case(
        "layer norm",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    Case(
        "instance norm",
        lambda: Head(nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True)), 3),
        (2, 5, 5),
    ),
    Case(
        "rms norm and prelu",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.PReLU(5), nn.Linear(5, 3)),
        (4,),
    ),
    Case("attention", Attention, (5, 4)),
    Case("transformer layer", Transformer, (3, 4)),
    Case("residual in place", Residual, (2, 4, 4)),
    Case("module twice", Twice, (4,)),
    Case("tied weight", Tied, (4,)),
    Case("raw parameter", Raw, (4,)),
    Case("embedding", Lookup, (5,), vocabulary=6),
    Case(
        "dropout",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    Case("frozen weight", _frozen, (4,)),
    Case("data-dependent branch", Branching, (4,)),
    Case("lstm", Recurrent, (4, 2), double_backward_in=(torch.float64,)),
]


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def plain_gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy by an ordinary backward pass.  # [P]"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(model(inputs), targets)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def plain_scores(case: Case, examples: int = 7) -> Tensor:
    """The score matrix, one ordinary backward pass an example.  # [N, P]"""
    model, inputs, targets = case.build(examples)
    return torch.stack(
        [plain_gradient(model, inputs[i : i + 1], targets[i : i + 1]) for i in range(examples)]
    )


def difference_hessian(case: Case, examples: int = 7, step: float = 1e-5) -> Tensor:
    """The Hessian by central differences of ordinary gradients, error about 1e-9.  # [P, P]"""
    model, inputs, targets = case.build(examples)
    model = copy.deepcopy(model)
    columns = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        flat = parameter.detach().view(-1)
        for i in range(len(flat)):
            value = float(flat[i])
            flat[i] = value + step
            up = plain_gradient(model, inputs, targets)
            flat[i] = value - step
            down = plain_gradient(model, inputs, targets)
            flat[i] = value
            columns.append((up - down) / (2 * step))
    return torch.stack(columns, 1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    scale = float(expected.norm())
    return float((got.to(expected) - expected).norm()) / (scale or 1.0)
