"""Functions as lists of operations."""

import pytest
import torch
from torch import nn
from torch.func import grad_and_value, vmap

from entropic_fast._utils import devices
from entropic_fast.dynamics.projected_sgd import _fx_cache as traced
from entropic_fast.dynamics.projected_sgd._fx_cache import FxCache
from entropic_fast.dynamics.projected_sgd._gradient_backends import choose, vmap_gradients
from entropic_fast.objective import Objective


def problem(replicas, model=None, seed=0):
    torch.manual_seed(seed)
    model = model or nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    x, y = torch.randn(20, 1, 3, 3), torch.randint(3, (20,))
    obj = Objective(model, "cross_entropy", (x, y))
    theta = obj.parameters_vector().repeat(replicas, 1)
    theta = theta + 0.1 * torch.randn_like(theta)
    return obj, theta, torch.randn(replicas, 4, 1, 3, 3), torch.randint(3, (replicas, 4))


def test_the_list_is_the_function_to_the_bit_on_other_arguments():
    obj, *first = problem(5)
    function = vmap(grad_and_value(lambda t, x, y: obj.losses(t, x, y).mean()))
    fast = FxCache(function)
    fast(*first)
    for seed in range(3):
        _, *arguments = problem(5, seed=seed + 1)
        for got, expected in zip(fast(*arguments), function(*arguments), strict=True):
            assert torch.equal(got, expected)
    assert next(iter(fast._lists.values())) is not function


def test_shapes_each_have_their_list_and_too_many_have_none():
    calls = []

    def function(x):
        calls.append(len(x))
        return (x * 2,)

    fast = FxCache(function)
    for _ in range(3):
        for n in range(1, traced.SHAPES + 2):
            assert torch.equal(fast(torch.ones(n))[0], torch.full((n,), 2.0))
    assert calls.count(1) == 2  # the call, and the making of the list
    assert calls.count(traced.SHAPES + 1) == 3


def test_what_is_not_the_same_the_second_time_is_called_as_it_is():
    count = [0]

    def function(x):
        count[0] += 1
        return (x + count[0],)

    fast = FxCache(function)
    before, after = (float(fast(torch.zeros(1))[0]) for _ in range(2))
    assert after > before and fast._lists and next(iter(fast._lists.values())) is function


@pytest.mark.parametrize(
    ("device_types", "off_by", "kept"),
    [({"cuda"}, 1e-6, False), ({"cpu"}, 1e-6, True), ({"cpu"}, 1e-2, False)],
)
def test_on_a_gpu_a_list_may_differ_by_rounding(monkeypatch, device_types, off_by, kept):
    """As of cuDNN's weight gradients, whose sums are in another order each time."""
    monkeypatch.setattr(devices, "GPU_TYPES", device_types)
    calls = [0]

    def function(x):
        calls[0] += 1
        return (x * (1 + off_by * calls[0]),)

    fast = FxCache(function)
    fast(torch.ones(3))
    assert (next(iter(fast._lists.values())) is not function) == kept


def test_what_cannot_be_traced_is_called_as_it_is():
    def function(x):
        return (x if float(x.sum()) > 0 else -x,)

    fast = FxCache(function)
    assert float(fast(torch.ones(1))[0]) == 1
    assert float(fast(-torch.ones(1))[0]) == 1


def test_more_replicas_than_a_call_takes_are_taken_in_parts(monkeypatch):
    obj, theta, x, y = problem(7)
    whole = vmap_gradients(obj)(theta, x, y)
    monkeypatch.setattr("entropic_fast.dynamics.projected_sgd._gradient_backends._CHUNK", 3)
    gradients = vmap_gradients(obj)
    for _ in range(2):
        for got, expected in zip(gradients(theta, x, y), whole, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_model_that_branches_on_values_goes_elsewhere():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.flatten, self.linear = nn.Flatten(), nn.Linear(9, 3)

        def forward(self, x):
            out = self.linear(self.flatten(x))
            return out if self.linear.weight.sum() > -1e6 else 2 * out

    obj, theta, x, y = problem(40, Branching())
    name, _, note = choose("auto", obj, theta, x, y)
    assert name != "vmap" and "vmap was not used" in note
    with pytest.raises(ValueError, match="backend"):
        choose("vmap", obj, theta, x, y)
