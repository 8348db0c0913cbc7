"""Examples of one array may differ in shape and way: their Gram matrix stays right."""

import logging
from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast.curvature import score_gram
from entropic_fast.objective import Objective

Batches = list[tuple[Tensor, Tensor]]


class Volumes(nn.Module):
    """A convolution of volumes, several an example: of one, its columns are the kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv3d(2, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, F, 2, 3, 3, 3]
        h = self.conv(x.flatten(0, 1)).flatten(2).mean(2).unflatten(0, x.shape[:2])
        return self.out(torch.tanh(h)).mean(1)


class LaterLayer(nn.Module):
    """A layer that only long sequences reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2]
        h = torch.tanh(self.a(x))
        if x.shape[1] > 3:
            h = torch.tanh(self.b(h))
        return self.out(h).mean(1)


class Dilated(nn.Module):
    """One weight in two geometries, by the length of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(3, 2, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, T]
        stride, dilation = (2, 1) if x.shape[2] > 6 else (1, 2)
        h = functional.conv1d(x, self.weight, stride=stride, padding=1, dilation=dilation)
        return self.out(torch.tanh(h).mean(2))


KINDS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "volumes": (Volumes, [(1, 2, 3, 3, 3), (2, 2, 3, 3, 3)]),
    "later layer": (LaterLayer, [(3, 2), (5, 2)]),
    "geometries": (Dilated, [(2, 6), (2, 8)]),
}


def build(kind: str, reverse: bool) -> tuple[nn.Module, Batches]:
    make, shapes = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        batches = [(torch.randn(2, *s).double(), torch.randn(2, 3).double()) for s in shapes]
    return model, batches[::-1] if reverse else batches


@pytest.mark.parametrize("strategy", ["memory", "disk", "recompute"])
@pytest.mark.parametrize("reverse", [False, True], ids=["short first", "long first"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_different_shapes_have_one_gram_matrix(kind: str, reverse: bool, strategy: str):
    model, batches = build(kind, reverse)
    rows = []
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            loss = (model(x[None]) - y).square().mean()
            found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    scores = torch.stack(rows)
    gram = score_gram(Objective(model, "mse", batches), strategy=strategy)
    assert relative_error(gram, scores @ scores.T) < 1e-13


def test_what_differs_is_logged(caplog: pytest.LogCaptureFixture):
    model, batches = build("later layer", reverse=False)
    with caplog.at_level(logging.INFO, logger="entropic_fast"):
        score_gram(Objective(model, "mse", batches), strategy="memory")
    assert "examples that differ (the first does not depend on 'b.weight')" in caplog.text
