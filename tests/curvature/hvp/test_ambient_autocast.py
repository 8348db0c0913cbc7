"""A `torch.autocast` around the call changes nothing; the model's own acts."""

import pytest
import torch
from torch import Tensor, nn

from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    autograd_only,
    gradient_norms,
)
from entropic_fast.objective import Objective


class OwnAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.second(torch.tanh(self.first(x))).float()


def objective(own: bool = False) -> Objective:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = (torch.randn(9, 4), torch.arange(9) % 3)
    return Objective(OwnAutocast() if own else plain, "cross_entropy", data)


def results(obj: Objective) -> list[Tensor]:
    v = torch.linspace(-1, 1, obj.num_params)
    H, J = HessianOperator(obj), JacobianOperator(obj)
    return [
        torch.tensor(obj.loss()),
        obj.gradient(),
        gradient_norms(obj),
        H @ v,
        H.quadratic_forms(v),
        GGNOperator(obj) @ v,
        J @ v,
        J.T @ torch.ones(J.shape[0]),
    ]


@pytest.mark.parametrize("own", [False, True], ids=["plain", "autocast in the model"])
def test_ambient_autocast_changes_nothing(own):
    expected = results(objective(own))
    obj = objective(own)  # whose programs are captured within autocast
    with torch.autocast("cpu", torch.bfloat16):
        within = results(obj)
        with autograd_only():
            by_autograd = results(obj)
    for other in (within, results(obj)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    tolerance = 0.05 if own else 1e-5
    for a, b in zip(by_autograd, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_autocast_in_the_model_acts():
    assert not torch.equal(objective(True).gradient(), objective(False).gradient())
