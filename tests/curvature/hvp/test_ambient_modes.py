"""Modes of torch's dispatcher around a call: the call does as it would without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from entropic_fast.curvature import GGNOperator, HessianOperator
from entropic_fast.objective import Objective


class Doubling(TorchDispatchMode):
    """Doubles every tanh."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is torch.ops.aten.tanh.default else found


def objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Objective(model, "mse", (torch.randn(5, 3).double(), torch.randn(5, 2).double()))


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_the_first_product_is_by_rules_while_flops_are_counted(operator):
    obj = objective()
    v = torch.randn(obj.num_params, dtype=torch.float64)
    expected = operator(objective()) @ v
    with FlopCounterMode(display=False) as counter:
        first = operator(obj)
        found = first @ v
    assert first.method == operator(obj).method == "graph"
    assert torch.equal(found, expected)
    with FlopCounterMode(display=False) as counter:
        first @ v
    # For 5 examples 2 * 12 parameters of the first layer and 2 * 8 of the second, several times.
    assert counter.get_total_flops() >= 3 * 5 * 2 * (12 + 8)


def test_hooks_on_all_modules_stay_in_their_order():
    called = []
    with FlopCounterMode(display=False):
        handle = modules.register_module_forward_hook(lambda *_: called.append("hook"))
        before = list(modules._global_forward_hooks.items())
        try:
            HessianOperator(objective()) @ torch.ones(26, dtype=torch.float64)
            assert list(modules._global_forward_hooks.items()) == before
        finally:
            handle.remove()
    assert called


def test_a_mode_that_changes_numbers_is_not_kept_with_the_model():
    obj, v = objective(), torch.ones(26, dtype=torch.float64)
    expected = HessianOperator(objective()) @ v
    with Doubling():
        HessianOperator(obj) @ v
    after = HessianOperator(obj)
    assert torch.equal(after @ v, expected)
    assert after.method == "graph"
