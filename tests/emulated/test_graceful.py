"""What may go wrong on a GPU, on the emulated one: said, and gone on from."""

from __future__ import annotations

import warnings

import pytest
import torch
from relax_cases import relax_with
from torch import nn

import entropic_fast as ef
from entropic_fast.dynamics.projected_sgd import _cuda_graph as cycle_graph
from entropic_fast.dynamics.projected_sgd import _gradient_backends as backends
from entropic_fast.paths import _cuda_graph as replay
from entropic_fast.training.models import initialize


class Reading(nn.Module):
    """Reads a value back in the forward pass, which no capture allows."""

    def forward(self, x):
        return x if float(x.detach().sum()) > -1e9 else 2 * x


def problem(*layers):
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator))
    model = initialize(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *layers, nn.Linear(4, 3)), 1)
    obj = ef.Objective(model, "cross_entropy", data, device="emulated")
    a = obj.parameters_vector()
    return obj, ef.linear_path(a, a + 0.1 * torch.ones(len(a)).to(a.device), 3)


def test_points_on_a_ring_are_on_the_angles_device():
    angle = torch.tensor([0.0, 1.0], dtype=torch.float64).to("emulated")
    ring = ef.RingPotential()
    for radius in (1.5, torch.tensor([1.5, 1.5], dtype=torch.float64).to("emulated")):
        found = ring.on_ring(angle, radius)
        assert found.device == angle.device
        torch.testing.assert_close(found.cpu(), ring.on_ring(angle.cpu(), 1.5))


def test_a_model_that_cannot_be_captured_goes_on_without_graphs():
    obj, path = problem(Reading())
    common = dict(lr=0.05, batch_size=6, project_every=2, steps=12, backend="loop")
    runs = [relax_with(obj, path, 0.5, cuda_graphs=graphs, **common) for graphs in (True, False)]
    assert runs[0].backend == "loop" and "CUDA graphs were not used" in runs[0].notes[0]
    assert torch.equal(runs[0].position, runs[1].position)


def test_after_replicas_are_lost_a_graph_of_the_others_is_captured(monkeypatch):
    captured = []
    capture = cycle_graph.GraphedCycles._capture

    def counting(self, table):
        captured.append(len(self._run.alive))
        capture(self, table)

    monkeypatch.setattr(cycle_graph.GraphedCycles, "_capture", counting)
    obj, path = problem()
    rates = [0.01, 0.1, 0.12, 0.14, 0.16, 0.18]
    common = dict(lr=rates, batch_size=3, project_every=2, steps=40, max_distance=0.5)
    runs = [relax_with(obj, path, 0.5, cuda_graphs=graphs, **common) for graphs in (True, False)]
    lost = runs[0].diverged_at[runs[0].diverged_at >= 0]
    assert len(lost.unique()) >= 2 and torch.equal(runs[0].diverged_at, runs[1].diverged_at)
    torch.testing.assert_close(runs[0].position, runs[1].position, equal_nan=True)
    assert len(captured) <= len(lost.unique()) and captured[-1] == len(rates) - len(lost)


def test_torchs_warning_of_a_context_does_not_refuse_vmap():
    class Cold(nn.Module):
        def forward(self, x):
            if torch._C._functorch.maybe_get_level(x) != -1:
                text = "Attempting to run cuBLAS, but there was no current CUDA context!"
                warnings.warn(text, stacklevel=2)
            return x

    obj, path = problem(Cold())
    theta = path.point(torch.tensor([0.2, 0.4], dtype=torch.float64).to("emulated"))
    inputs, targets = next(iter(obj.batches()))[1:]
    name, _, note = backends.choose(
        "auto", obj, theta, inputs.expand(2, -1, -1), targets.expand(2, -1)
    )
    assert (name, note) == ("vmap", "")


@pytest.mark.parametrize("text", ["There is a performance drop because of an operator"])
def test_other_warnings_of_vmap_still_do(text):
    class Slow(nn.Module):
        def forward(self, x):
            if torch._C._functorch.maybe_get_level(x) != -1:
                warnings.warn(text, stacklevel=2)
            return x

    obj, path = problem(Slow())
    theta = path.point(torch.tensor([0.2, 0.4], dtype=torch.float64).to("emulated"))
    inputs, targets = next(iter(obj.batches()))[1:]
    _, _, note = backends.choose(
        "auto", obj, theta, inputs.expand(2, -1, -1), targets.expand(2, -1)
    )
    assert text in note


def test_work_for_more_shapes_than_have_graphs_runs_on_the_current_stream(monkeypatch):
    device = torch.device("emulated")
    aside, total = [], torch.zeros(1, device=device)
    on_side_stream = replay.on_side_stream
    monkeypatch.setattr(
        replay, "on_side_stream", lambda *args: (aside.append(1), on_side_stream(*args))
    )
    add = replay.Replayed(lambda x: total.add_(x.sum()), device)
    for size in range(1, replay.SHAPES + 3):
        for _ in range(replay.WARM_UP + 1):
            add(torch.ones(size, device=device))
    assert len(aside) == replay.SHAPES * replay.WARM_UP and not add.note
    assert total.item() == (replay.WARM_UP + 1) * sum(range(1, replay.SHAPES + 3))
