"""The emulated GPU itself: what it counts, what it rejects, and that it finds planted faults."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from emulated_gpu import Graph
from relax_cases import relax_with
from torch import nn

import entropic_fast as ef
from entropic_fast.curvature.hvp._interpreter import GraphInterpreter
from entropic_fast.dynamics.projected_sgd._cuda_graph import GraphedCycles
from entropic_fast.dynamics.projected_sgd._replica_state import ReplicaState
from entropic_fast.training.models import digits_cnn, initialize

DEVICE = "emulated"


def seen(emulated, call) -> tuple[int, int, int]:
    """Launches, synchronizations and copies of a call."""
    with emulated.counted() as counts:
        call()
    return counts.launches, counts.synchronizations, counts.copies


def there(*shape: int) -> torch.Tensor:
    return torch.ones(*shape).to(DEVICE)


# ---- what is counted -----------------------------------------------------------------------------

CALLS = {
    "a launch": (lambda x: x + 1, (1, 0, 0)),
    "two launches": (lambda x: (x + 1) * x, (2, 0, 0)),
    "a number from the host rides along": (lambda x: x * torch.tensor(2.0), (1, 0, 0)),
    "a view is free": (lambda x: x[1:].t()[::2].unsqueeze(0), (0, 0, 0)),
    "an allocation is free": (lambda x: torch.empty_like(x), (0, 0, 0)),
    "a value read back": (lambda x: float(x.sum()), (2, 1, 0)),
    "a decision": (lambda x: bool((x > 0).all()), (3, 1, 0)),
    "a tensor to the host": (lambda x: x.cpu(), (1, 1, 0)),
    "a tensor to a list": (lambda x: x.tolist(), (1, 1, 0)),
    "a mask as an index": (lambda x: x[x > 0], (2, 1, 0)),
    "places of what is not zero": (lambda x: x.nonzero(), (1, 1, 0)),
    "an index on the host": (lambda x: x[torch.tensor([0, 1])], (1, 0, 1)),
    "a tensor from a list": (lambda x: torch.tensor([1.0, 2.0], device=DEVICE), (0, 0, 1)),
    "a tensor from the host": (lambda x: torch.ones(3).to(DEVICE), (1, 0, 1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts_are_what_they_should_be(emulated, name: str):
    call, expected = CALLS[name]
    x = there(4, 2)
    assert seen(emulated, lambda: call(x)) == expected


def test_a_backward_pass_is_counted_and_computed(emulated):
    weight = there(3, 2).requires_grad_()
    launches, synchronizations, copies = seen(emulated, lambda: (weight * 3).sum().backward())
    assert weight.grad.tolist() == [[3.0, 3.0]] * 3
    assert launches >= 3 and (synchronizations, copies) == (0, 0)


def test_convolutions_and_products_in_tf32_are_recorded_where_torch_would_round(emulated):
    image, kernel, x = there(1, 1, 4, 4), there(1, 1, 3, 3), there(1, 2)
    model = nn.Linear(2, 2).to(DEVICE)
    with mock.patch.object(emulated, "_note") as note:
        torch.conv2d(image.double(), kernel.double())
        model(x)
        assert not note.called
        torch.conv2d(image, kernel)  # torch's default
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            model(x)
        finally:
            torch.set_float32_matmul_precision(before)
    assert [str(call.args[1]) for call in note.mock_calls] == [
        "aten.convolution.default",
        "aten.addmm.default",
    ]


def test_autocast_lowers_the_precision_of_products():
    with torch.autocast(DEVICE, torch.bfloat16):
        found = nn.Linear(2, 2).to(DEVICE)(there(1, 2))
    assert found.dtype == torch.bfloat16


# ---- what is rejected ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, host: x + host,
        lambda x, host: x @ host.t(),
        lambda x, host: torch.cat([x, host]),
        lambda x, host: torch.where(x > 0, x, host),
        lambda x, host: x.index_put((torch.tensor([0]).to(DEVICE),), host[0]),
        lambda x, host: x.add_(host),
        lambda x, host: host.add_(x),
        lambda x, host: nn.functional.linear(x, host),
    ],
)
def test_operands_on_two_devices_are_rejected(call):
    with pytest.raises(RuntimeError, match="at least two devices"):
        call(there(2, 2), torch.ones(2, 2))


def test_cudnn_refuses_what_it_refuses_on_cuda():
    model, x = nn.LSTM(2, 3).to(DEVICE).eval(), there(4, 1, 2)
    with pytest.raises(RuntimeError, match="only be called in training mode"):
        model(x)[0].sum().backward()
    model.train()
    parameters = list(model.parameters())
    torch.autograd.grad(model(x)[0].sum(), parameters)
    with pytest.raises(RuntimeError, match="Double backwards is not supported"):
        torch.autograd.grad(model(x)[0].sum(), parameters, create_graph=True)
    with torch.backends.cudnn.flags(enabled=False):
        torch.autograd.grad(model(x)[0].sum(), parameters, create_graph=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: float(x.sum()), "not permitted when stream is capturing"),
        (lambda x: x[x > 0], "not permitted when stream is capturing"),
        (lambda x: x.cpu(), "not permitted when stream is capturing"),
        (lambda x: x + torch.tensor([1.0], device=DEVICE), "when stream is capturing"),
        (lambda x: x.copy_(torch.ones(3)), "when stream is capturing"),
    ],
)
def test_a_capture_rejects_synchronizations_and_copies(call, words: str):
    x, graph = there(3), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=words), torch.cuda.graph(graph):
        call(x)


def test_a_graph_computes_when_launched_and_reads_its_memory_anew():
    x, total, graph = there(3), torch.zeros(3).to(DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
        total += y
    assert total.tolist() == [0.0] * 3
    graph.replay()
    x.fill_(5)
    graph.replay()
    assert total.tolist() == [12.0] * 3 and y.tolist() == [10.0] * 3


# ---- planted in the package ----------------------------------------------------------------------


@pytest.fixture
def problem():
    """An objective on the emulated GPU, a path, and settings of a short relaxation."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(24, 1, 8, 8, generator=generator), torch.arange(24) % 10
    model = initialize(digits_cnn("none", channels=(2, 2, 2)), 1)
    obj = ef.Objective(model, "cross_entropy", data, device=DEVICE)
    a = obj.parameters_vector()
    path = ef.linear_path(a, a + 0.1 * torch.linspace(-1, 1, len(a)).to(DEVICE), pivots=3)
    return SimpleNamespace(obj=obj, path=path)


def relaxed(problem, graphs: bool = True) -> ef.Trajectory:
    common = dict(lr=0.01, batch_size=6, project_every=3, steps=15, backend="loop")
    return relax_with(problem.obj, problem.path, 0.5, **common, cuda_graphs=graphs)


def test_graphs_are_launched_and_change_nothing(problem):
    with mock.patch.object(Graph, "replay", autospec=True, side_effect=Graph.replay) as replay:
        with_graphs = relaxed(problem)
    assert replay.call_count == 3  # of five cycles, of which two are done before one is captured
    without = relaxed(problem, graphs=False)
    assert with_graphs.backend == "loop+graphs" and not with_graphs.notes
    assert torch.equal(with_graphs.loss, without.loss)


def test_a_graph_that_reads_an_old_table_of_minibatches_shows_as_other_numbers(
    problem, monkeypatch
):
    launch = GraphedCycles._launch

    def stale(self: GraphedCycles, table: torch.Tensor) -> None:
        launch(self, table if self._graph is None else self._table)

    monkeypatch.setattr(GraphedCycles, "_launch", stale)
    with_graphs, without = relaxed(problem), relaxed(problem, graphs=False)
    assert not torch.equal(with_graphs.loss, without.loss)


@pytest.mark.parametrize(
    "planted",
    [
        lambda run: float(run.theta.sum()),
        lambda run: run.theta.add_(torch.tensor([0.0], device=DEVICE)),
    ],
    ids=["a value read back", "a tensor from a list"],
)
def test_what_an_update_may_not_do_keeps_it_from_being_captured(problem, monkeypatch, planted):
    updates = ReplicaState.updates

    def planting(self: ReplicaState, table: torch.Tensor) -> None:
        planted(self)
        updates(self, table)

    monkeypatch.setattr(ReplicaState, "updates", planting)
    found = relaxed(problem)
    assert found.backend == "loop" and "stream is capturing" in found.notes[0]


def test_weights_made_on_the_cpu_are_found_in_products(problem, monkeypatch):
    jvp = GraphInterpreter.jvp

    def planting(self: GraphInterpreter, values, directions, **options):
        return jvp(self, values, [t.cpu() for t in directions], **options)

    v = problem.obj.parameters_vector()
    monkeypatch.setattr(GraphInterpreter, "jvp", planting)
    operator = ef.HessianOperator(problem.obj)
    operator @ v  # goes by autograd, and says why
    assert "at least two devices" in operator.method


def test_losses_made_on_the_cpu_are_found_in_a_step_of_a_path(problem, monkeypatch):
    monkeypatch.setattr(
        ef.Objective, "losses", lambda self, theta, x, y: theta.sum() * torch.ones(len(x))
    )
    config = ef.AutoNEBConfig(pivots=3, cycles=((1, 0.1),))
    pivots = problem.path.pivots
    with pytest.raises(RuntimeError, match="at least two devices"):
        ef.auto_neb(problem.obj, pivots[0], pivots[-1], config)
