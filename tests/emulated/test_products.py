"""Products and quadratic forms on the emulated GPU: launches, CUDA graphs, results of the CPU."""

from __future__ import annotations

import emulated_gpu
import pytest
import torch
from torch import nn
from torch.nn import functional

import entropic_fast as ef
from entropic_fast.curvature.hvp import _engine as engines
from entropic_fast.curvature.hvp._fusion import NormActBackward, NormActForward
from entropic_fast.training import models


def resnet(device: str, norm: str = "running") -> ef.Objective:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    model = models.initialize(models.resnet(20), 1)
    return ef.Objective(model, "cross_entropy", (images, labels), norm=norm, device=device)


def small(device: str, loss="cross_entropy", dtype=torch.float64) -> ef.Objective:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(9, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (9,), generator=generator)
    model = models.initialize(models.digits_cnn("batch", channels=(4, 4, 4)), 1).to(dtype)
    return ef.Objective(model, loss, (images, labels), device=device, batch_size=5)


def vectors(obj: ef.Objective, count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(obj.num_params, count, generator=generator, dtype=obj.dtype)


def launches(work) -> emulated_gpu.Counts:
    with emulated_gpu.counted() as seen:
        work()
    return seen


@pytest.fixture(scope="module")
def hessian():
    """An operator of ResNet-20 that has multiplied once, with vectors for it."""
    with emulated_gpu.present():
        obj = resnet("emulated")
        operator = ef.HessianOperator(obj)
        columns = vectors(obj, 8).to("emulated")
        operator @ columns[:, :4]
    return operator, columns


def test_a_product_stays_within_its_launches(hessian):
    operator, columns = hessian
    four = columns[:, :4]
    assert operator.method == "graph"
    assert launches(lambda: operator @ four).launches <= 500  # values computed with it
    # Eight at once, by values that are kept: as it is, captured, and by the graph.
    assert launches(lambda: operator @ columns).launches <= 330
    assert operator.graphs == ""
    operator @ columns
    assert operator.graphs == "captured"
    by_graph = launches(lambda: operator @ columns[:, :7])
    assert by_graph.launches <= 16
    assert by_graph.synchronizations == 1 and by_graph.copies == 0


def test_a_quadratic_form_stays_within_its_launches(hessian):
    operator, columns = hessian
    assert launches(lambda: operator.quadratic_forms(columns)).launches <= 400
    operator.quadratic_forms(columns)
    assert launches(lambda: operator.quadratic_forms(columns)).launches <= 215
    operator.quadratic_forms(columns)
    by_graph = launches(lambda: operator.quadratic_forms(columns[:, :5]))
    assert by_graph.launches <= 16
    assert by_graph.synchronizations == 1 and by_graph.copies == 0


def test_normalizations_are_fused_as_on_a_cpu(hessian):
    operator, _ = hessian
    interpreter = next(iter(operator._engine._interpreters.values()))
    assert sum(isinstance(u, NormActForward) for u in interpreter._forward_regions) == 21
    assert sum(isinstance(u, NormActBackward) for u in interpreter._backward_regions) == 21


class Halves(nn.Module):
    """Grouped, dilated, strided and transposed convolutions, one and two-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.dilated = nn.Conv2d(4, 3, 2, dilation=2, bias=False)
        self.line = nn.Conv1d(3, 5, 3, padding=2)

    def forward(self, x):
        x = torch.tanh(self.grouped(x.repeat(1, 4, 1, 1)))
        x = torch.tanh(self.dilated(torch.tanh(self.up(x))))
        return self.line(x.flatten(2)).mean(2)


@pytest.mark.parametrize("count", [1, 3])
def test_convolutions_of_every_kind_give_the_cpus_products(count):
    generator = torch.Generator().manual_seed(3)
    data = (torch.randn(5, 1, 6, 6, generator=generator), torch.randn(5, 5, generator=generator))
    torch.manual_seed(0)
    model = Halves().double()
    expected = found = None
    for device in ("cpu", "emulated"):
        obj = ef.Objective(model, "mse", (data[0].double(), data[1].double()), device=device)
        operator = ef.HessianOperator(obj)
        columns = vectors(obj, count).to(device)
        found = torch.cat([operator @ columns, operator.quadratic_forms(columns)[None]])
        assert operator.method == "graph"
        expected = found if expected is None else expected
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-12)


LOSSES = {
    "cross_entropy": "cross_entropy",
    "weighted": nn.CrossEntropyLoss(
        torch.linspace(0.5, 2, 10), ignore_index=3, label_smoothing=0.1, reduction="none"
    ),
    "custom": lambda out, y: functional.cross_entropy(out, y, reduction="none") ** 1.5,
}


@pytest.mark.parametrize("kind", ["HessianOperator", "GGNOperator"])
@pytest.mark.parametrize("name", LOSSES)
def test_repeated_products_with_new_vectors_are_the_cpus(kind, name):
    cpu, gpu = small("cpu", LOSSES[name]), small("emulated", LOSSES[name])
    expected, found = (getattr(ef, kind)(obj) for obj in (cpu, gpu))
    for repetition, count in enumerate([2, 2, 2, 1, 2, 3, 4, 9, 9]):
        columns = vectors(cpu, count, repetition)
        torch.testing.assert_close(
            (found @ columns.to("emulated")).cpu(), expected @ columns, rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            found.quadratic_forms(columns.to("emulated")).cpu(),
            expected.quadratic_forms(columns),
            rtol=1e-9,
            atol=1e-12,
        )
    assert found.graphs == ("" if name == "custom" else "captured")


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no capture here")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    cpu, gpu = small("cpu"), small("emulated")
    expected, found = ef.HessianOperator(cpu), ef.HessianOperator(gpu)
    for repetition in range(4):
        columns = vectors(cpu, 2, repetition)
        torch.testing.assert_close(
            (found @ columns.to("emulated")).cpu(), expected @ columns, rtol=1e-9, atol=1e-12
        )
    assert found.graphs == "CUDA graphs were not used: RuntimeError: no capture here"


@pytest.mark.parametrize("why", ["ENTROPIC_FAST_CUDA_GRAPHS=0", "too little memory"])
def test_products_without_graphs(monkeypatch, why):
    cpu, gpu = small("cpu"), small("emulated")
    if why == "ENTROPIC_FAST_CUDA_GRAPHS=0":
        monkeypatch.setenv("ENTROPIC_FAST_CUDA_GRAPHS", "0")
    else:
        monkeypatch.setattr(engines, "BUFFERS", 0)
    expected, found = ef.HessianOperator(cpu), ef.HessianOperator(gpu)
    for repetition in range(5):
        columns = vectors(cpu, 2, repetition)
        torch.testing.assert_close(
            (found @ columns.to("emulated")).cpu(), expected @ columns, rtol=1e-9, atol=1e-12
        )
    assert why in found.graphs


def test_examples_are_not_read_where_values_are_kept():
    obj = small("emulated")
    read = []

    class Loader:
        def __iter__(self):
            read.append(1)
            return iter([(torch.ones(3, 1, 8, 8), torch.arange(3)) for _ in range(2)])

    gpu = obj.with_data(Loader())
    operator, columns = ef.HessianOperator(gpu), vectors(obj, 2).to("emulated")
    for _ in range(4):
        operator @ columns
    count = len(read)
    operator @ columns
    assert len(read) == count
