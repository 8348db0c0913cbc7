"""Networks that cannot take channels last give what their twins that can give."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import entropic_fast as ef
from entropic_fast._torch.memory_format import preferred_memory_format
from entropic_fast.dynamics.projected_sgd._thread_pool import ThreadPoolGradients
from entropic_fast.training import TrainConfig, TrainState, train
from entropic_fast.training.data import load


class Viewer(nn.Module):
    """Flattens by `view`, which needs the usual layout."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).view(len(x), -1))


def twins(channels):
    torch.manual_seed(0)
    viewer = Viewer(channels)
    return viewer, copy.deepcopy(nn.Sequential(viewer.first, nn.ReLU(), nn.Flatten(), viewer.last))


def images(channels=3, count=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, 8, 8, generator=generator)
    return x, torch.randint(10, (count,), generator=generator)


def test_it_is_trained():
    data, _ = load("digits", limit=100)
    pair = twins(1)
    for model in pair:
        config = TrainConfig(epochs=2, batch_size=50, augment=False)
        train(model, data, config, seed=0, resume=TrainState())
    for a, b in zip(*(model.parameters() for model in pair), strict=True):
        torch.testing.assert_close(a, b)


def test_its_path_is_found():
    found = []
    for model in twins(3):
        obj = ef.Objective(model.double(), "cross_entropy", images())
        a = obj.parameters_vector()
        b = a + torch.randn(len(a), generator=torch.Generator().manual_seed(2)).double()
        config = ef.AutoNEBConfig(pivots=3, cycles=((3, 0.1),), batch_size=8)
        found.append(ef.auto_neb(obj, a, b, config).path.pivots)
    torch.testing.assert_close(*found)


def test_its_replicas_have_their_gradients():
    x, y = images(count=8)
    found = []
    for model in twins(3):
        obj = ef.Objective(model, "cross_entropy", (x, y))
        gradients = ThreadPoolGradients(obj, 1)
        theta = obj.parameters_vector().repeat(2, 1)
        losses, rows = gradients(theta, x.view(2, 4, 3, 8, 8), y.view(2, 4))
        found.append((losses.clone(), rows.clone()))
        gradients.close()
    torch.testing.assert_close(*found)


class Scrambler(nn.Module):
    """Reads memory as if it were in the usual order, without a word."""

    def forward(self, x):
        return torch.as_strided(x, (len(x), x[0].numel()), (x[0].numel(), 1))


@pytest.mark.parametrize(
    ("network", "layout"),
    [
        (nn.Conv2d(3, 2, 3), torch.channels_last),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), torch.channels_last),
        (Scrambler(), torch.contiguous_format),
        (Viewer(3), torch.contiguous_format),
        (nn.Linear(5, 2), torch.contiguous_format),  # takes no such images at all
    ],
)
def test_the_layout_is_one_that_gives_the_same(network, layout):
    assert preferred_memory_format(network, images()[0]) is layout


def test_training_tries_layouts_without_a_trace():
    data, _ = load("digits", limit=20)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    net.append(nn.Linear(72, 10))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    config = TrainConfig(epochs=1, batch_size=10, augment=False)
    train(net, data, config, seed=0, resume=TrainState(), stop_epoch=0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())


class Strided(nn.Module):
    """A strided convolution of one position, whose weight gradient overruns with channels last."""

    def __init__(self, channels, stride=2):
        super().__init__()
        self.first, self.short = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 8, 1)
        self.short.stride = (stride, stride)

    def forward(self, x):
        return self.short(torch.tanh(self.first(x))).flatten(1)


@pytest.mark.parametrize(
    ("channels", "stride", "layout"),
    [
        (2, 2, torch.contiguous_format),
        (6, 3, torch.contiguous_format),
        (4, 1, torch.channels_last),
        (8, 2, torch.channels_last),
    ],
)
def test_convolutions_that_overrun_with_channels_last_have_the_usual_layout(
    channels, stride, layout
):
    assert preferred_memory_format(Strided(channels, stride), images()[0]) is layout


OVERRUN = """
import torch, entropic_fast as ef
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(),
    torch.nn.Conv2d(4, 8, 1, 2), torch.nn.Flatten(), torch.nn.Linear(128, 10))
for _ in range(4):
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    obj = ef.Objective(net, "cross_entropy", (x, y))
    for k in (1, 3, 8):
        ef.HessianOperator(obj) @ torch.randn(obj.num_params, k)
        kept = [torch.randn(n) for n in (10, 100, 1000, 5000)]
    ef.gradient_norms(obj)
print("done")
"""


def test_products_of_such_a_network_leave_the_heap_as_it_was():
    """In a process of its own, whose allocator checks every block that it frees, where it can."""
    checked = "/lib/x86_64-linux-gnu/libc_malloc_debug.so.0"
    checks = {"LD_PRELOAD": checked, "MALLOC_CHECK_": "3"} if Path(checked).exists() else {}
    run = subprocess.run(
        [sys.executable, "-c", OVERRUN],
        env={**os.environ, **checks},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout.strip()) == (0, "done"), run.stderr
