"""Cycles as CUDA graphs are the cycles without: their bookkeeping anywhere, themselves on a GPU."""

import contextlib
import math

import pytest
import torch
from relax_cases import conv_problem, mlp_problem, relax_with
from torch import nn

from entropic_fast.dynamics import Execution, ProjectedSGD, relax
from entropic_fast.dynamics.projected_sgd import _cuda_graph as cycle_graph
from entropic_fast.dynamics.projected_sgd import _gradient_backends as backends
from entropic_fast.dynamics.projected_sgd._cuda_graph import GraphedCycles
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.dynamics.projected_sgd._optimizers import Optimizer
from entropic_fast.dynamics.projected_sgd._replica_state import TENSORS, ReplicaState
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.models import digits_cnn, initialize

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run_of(lrs, optimizer="nesterov"):
    _, obj, path = mlp_problem()
    starts = torch.full((len(lrs),), 0.5, dtype=torch.float64)
    minibatches = Minibatches(obj, 5, 0, range(len(lrs)))
    return ReplicaState(
        path,
        starts,
        Optimizer(
            ProjectedSGD(lrs, 1, optimizer=optimizer), torch.tensor(lrs, dtype=torch.float64)
        ),
        minibatches,
        backends.loop_gradients(obj),
        math.inf,
    )


def pretend(monkeypatch, cycles, run, fail=False):
    """Graphs on a CPU: capturing leaves all numbers as they are, a launch does the updates."""
    captures = []

    class Graph:
        def replay(self):
            run.updates(cycles._table)

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before = {name: part.clone() for name, part in run.state().items()}
        first, places = run.first_loss.clone(), [getattr(run, name) for name in TENSORS]
        if fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield
        after = [getattr(run, name) for name in TENSORS]
        assert all(a is b for a, b in zip(places, after, strict=True))  # changed in place
        for name, part in run.state().items():
            part.copy_(before[name])
        run.first_loss.copy_(first)
        captures.append(len(run.alive))

    monkeypatch.setattr(cycle_graph.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cycle_graph.torch.cuda, "graph", capture)
    for name in ("device", "stream", "Stream"):
        monkeypatch.setattr(cycle_graph.torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(cycle_graph.torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(cycle_graph.torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cycle_graph.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cycle_graph.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cycles, "_on_side_stream", run.updates)
    cycles._enabled = True
    return captures


def states_are_equal(a, b):
    assert a.state().keys() == b.state().keys()
    for name, part in a.state().items():
        torch.testing.assert_close(part, b.state()[name], rtol=0, atol=0, msg=name)
    assert torch.equal(a.first_loss, b.first_loss)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
def test_launched_cycles_are_the_cycles_and_dropping_a_replica_captures_anew(
    monkeypatch, optimizer
):
    lrs = [0.1, 0.02, 0.05]
    plain, graphed = run_of(lrs, optimizer), run_of(lrs, optimizer)
    cycles = GraphedCycles(graphed, 4)
    captures = pretend(monkeypatch, cycles, graphed)
    for number in range(12):
        if number == 6:  # a replica diverges
            plain.theta[1], graphed.theta[1] = math.nan, math.nan
        plain.cycle(4)
        cycles(4)
        states_are_equal(plain, graphed)
    cycles(3)
    plain.cycle(3)
    states_are_equal(plain, graphed)
    assert captures == [3, 2] and cycles.captured and plain.diverged_at.tolist()[1] in (25, 28)


def test_where_capture_fails_cycles_run_as_they_are_and_the_note_says_why(monkeypatch):
    plain, graphed = run_of([0.1, 0.02]), run_of([0.1, 0.02])
    cycles = GraphedCycles(graphed, 4)
    pretend(monkeypatch, cycles, graphed, fail=True)
    ended = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *pool: ended.append(pool), raising=False)
    for _ in range(6):
        plain.cycle(4)
        cycles(4)
    states_are_equal(plain, graphed)
    assert not cycles.captured
    assert ended == [(None, (0, 1))] * 2
    assert cycles.note.endswith("RuntimeError: operation not permitted when stream is capturing")


def test_replicas_that_diverge_one_by_one_are_not_followed_by_a_capture_each(monkeypatch):
    rates = [0.02] * 24
    plain, graphed = run_of(rates), run_of(rates)
    cycles = GraphedCycles(graphed, 2)
    captures = pretend(monkeypatch, cycles, graphed)
    for number in range(70):
        if number % 3 == 2 and len(plain.alive) > 4:
            plain.theta[0], graphed.theta[0] = math.nan, math.nan
        plain.cycle(2)
        cycles(2)
    states_are_equal(plain, graphed)
    assert captures == [24, 4]  # the second once nobody was lost for four cycles


def test_on_a_cpu_there_are_no_graphs_and_nothing_to_say():
    obj, path = conv_problem("none")
    run = relax(
        obj,
        path,
        0.5,
        ProjectedSGD(0.01, 4, steps=60),
        replicas=2,
        execution=Execution(backend="vmap"),
    )
    assert run.backend == "vmap" and run.notes == ()


def cuda_problem(model):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 1, 8, 8, generator=g), torch.randint(10, (40,), generator=g)
    obj = Objective(model.double(), "cross_entropy", data, device="cuda")
    a = obj.parameters_vector()
    b = a + torch.linspace(-0.1, 0.1, len(a), device="cuda", dtype=a.dtype)
    return obj, linear_path(a, b, pivots=3)


@gpu
@needs_cuda
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_cycles_as_graphs_are_the_cycles_without(backend, optimizer, full):
    obj, path = cuda_problem(initialize(digits_cnn("batch", channels=(4, 4, 4)), 1))
    lr = 0.002 if optimizer == "adam" else 0.05
    common = dict(lr=[lr, lr / 2, lr], batch_size=40 if full else 7, project_every=4, steps=62)
    common |= dict(backend=backend, loss_every=20, record_every=4)
    with_graphs, without = (
        relax_with(obj, path, [0.2, 0.6, 0.6], optimizer=optimizer, cuda_graphs=graphs, **common)
        for graphs in (True, False)
    )
    assert with_graphs.backend == f"{backend}+graphs" and without.backend == backend
    for name in ("position", "distance", "loss", "full_loss"):
        torch.testing.assert_close(
            getattr(with_graphs, name),
            getattr(without, name),
            rtol=1e-7,
            atol=1e-10,
            equal_nan=True,
        )


@gpu
@needs_cuda
def test_a_replica_that_diverges_under_a_graph_is_dropped():
    obj, path = cuda_problem(initialize(digits_cnn("batch", channels=(4, 4, 4)), 1))
    common = dict(batch_size=7, project_every=4, steps=60, max_distance=0.3)
    runs = [
        relax_with(obj, path, 0.5, lr=[0.02, 0.6, 0.02], cuda_graphs=graphs, **common)
        for graphs in (True, False)
    ]
    assert torch.equal(runs[0].diverged_at, runs[1].diverged_at)
    torch.testing.assert_close(
        runs[0].position, runs[1].position, rtol=1e-7, atol=1e-10, equal_nan=True
    )


class Reading(nn.Module):
    """Reads a value back in the forward pass, which no capture allows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        y = self.layers(x)
        return y if float(y.detach().sum()) > -1e9 else 2 * y


@gpu
@needs_cuda
def test_a_model_that_cannot_be_captured_runs_without_a_graph_and_says_so():
    obj, path = cuda_problem(initialize(nn.Sequential(Reading()), 1))
    common = dict(lr=0.05, batch_size=7, project_every=4, steps=40, backend="loop")
    runs = [relax_with(obj, path, 0.5, cuda_graphs=graphs, **common) for graphs in (True, False)]
    assert runs[0].backend == "loop" and "CUDA graphs were not used" in runs[0].notes[0]
    torch.testing.assert_close(runs[0].position, runs[1].position, rtol=1e-9, atol=1e-12)
