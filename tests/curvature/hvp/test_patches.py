"""Convolutions as matrix products, which few positions and many channels choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double_backward import assert_those_of_double_backward
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast.curvature.hvp import _patches

LAYERS: dict[str, dict[str, Any]] = {
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "of stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "1 x 1 of stride 2": {"kernel_size": 1, "stride": 2},
    "dilated, without bias": {
        "kernel_size": (2, 3), "padding": (1, 2), "dilation": (1, 2), "stride": (1, 2),
        "bias": False,
    },
    "that drops the last row": {"kernel_size": 2, "stride": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patches, "RATIO", float("inf"))


def assert_right(model: nn.Module, x: Tensor, count: int = 3) -> None:
    obj = ef.Objective(model.double().eval(), "cross_entropy", (x, torch.arange(len(x)) % 2))
    assert_those_of_double_backward(obj, count)


@pytest.mark.parametrize("size", [(5, 5), (3, 6)])
@pytest.mark.parametrize("name", LAYERS)
def test_products_and_forms_are_those_of_double_backward(name: str, size: Any) -> None:
    torch.manual_seed(1)
    head = [nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, **LAYERS[name]))
    model.extend(head)
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    model.double()(x)
    assert_right(model, x)


class Branches(nn.Module):
    """Two convolutions of one input, as at the start of a residual network's stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.wide, self.narrow = nn.Conv2d(4, 3, 3, 2, 1), nn.Conv2d(4, 3, 1, 2)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return torch.relu(self.norm(self.wide(x)) + self.narrow(x)).mean((2, 3))


@pytest.mark.parametrize("count", [1, 5])
def test_convolutions_of_one_input_have_their_own_patches(count: int) -> None:
    torch.manual_seed(2)
    assert_right(Branches(), torch.randn(4, 2, 5, 5, dtype=torch.float64), count)


def test_frozen_weights_have_no_tangents() -> None:
    torch.manual_seed(3)
    model = Branches()
    model.wide.requires_grad_(False)
    assert_right(model, torch.randn(4, 2, 4, 4, dtype=torch.float64))


def test_one_position_and_one_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh(), nn.Conv2d(1, 2, 1), nn.Flatten())
    assert_right(model, torch.randn(2, 1, 1, 1, dtype=torch.float64), 1)
