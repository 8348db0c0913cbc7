"""AutoNEB on the emulated GPU: the CPU's path, in few launches and one synchronization a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import entropic_fast as ef
from entropic_fast import DivergenceError
from entropic_fast.paths import NEBState
from entropic_fast.paths._descent import Descent
from entropic_fast.training import models


def objectives(model, shape=(24, 1, 8, 8), dtype=torch.float32, **options):
    """An objective on the CPU and the same on the emulated GPU, and the ends of a path."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(dtype)
    data = (images, torch.randint(10, shape[:1], generator=generator))
    model = models.initialize(model, 1).to(dtype)
    cpu, gpu = (
        ef.Objective(model, "cross_entropy", data, device=device, **options)
        for device in ("cpu", "emulated")
    )
    a = cpu.parameters_vector()
    b = 1.1 * a + 0.05 * torch.randn(len(a), generator=generator).to(a)
    return (cpu, a, b), (gpu, a.to("emulated"), b.to("emulated"))


def cnn(norm="batch"):
    layers = [nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 10)]
    if norm == "batch":
        layers.insert(1, nn.BatchNorm2d(2))
    return nn.Sequential(*layers)


CONFIG = ef.AutoNEBConfig(
    pivots=4,
    max_pivots=6,
    cycles=((6, 0.05), (4, 0.02)),
    batch_size=8,
    insert_threshold=0.01,
    eval_points=2,
)


def require_equal(found, expected, tolerance):
    """The same path and history, to rounding."""
    assert found.path.pivots.device.type == "emulated"
    pivots = found.path.pivots.cpu()
    assert float((pivots - expected.path.pivots).norm() / expected.path.pivots.norm()) < tolerance
    for table in ("history", "cycles", "losses"):
        ours, theirs = getattr(found, table), getattr(expected, table)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=100 * tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("changes", "dtype", "graphs"),
    [
        ({}, torch.float32, True),
        ({}, torch.float64, False),
        ({"batch_size": None, "cycles": ((5, 0.05),)}, torch.float64, True),
        ({"springs": 2.0, "weight_decay": 0.0, "cycles": ((5, 0.05),)}, torch.float64, True),
    ],
    ids=["minibatches", "without graphs", "all examples", "springs"],
)
def test_the_path_is_the_cpus(changes, dtype, graphs):
    # Batches of 10, 10 and 4: two graphs, one for each shape.
    cpu, gpu = objectives(cnn(), dtype=dtype, batch_size=10)
    config = dataclasses.replace(CONFIG, **changes)
    found = ef.auto_neb(*gpu, config, cuda_graphs=graphs)
    assert found.notes == ()
    require_equal(found, ef.auto_neb(*cpu, config), 1e-6 if dtype == torch.float32 else 1e-13)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    _, gpu = objectives(cnn("none"), dtype=torch.float64)
    states = []
    whole = ef.auto_neb(*gpu, CONFIG, on_cycle=states.append)
    states[0].save(tmp_path / "state.safetensors")
    state = NEBState.load(tmp_path / "state.safetensors")
    require_equal(ef.auto_neb(*gpu, CONFIG, resume=state), whole.__class__(
        whole.path.to("cpu"), whole.losses, whole.history, whole.cycles, whole.saddle
    ), 1e-13)  # fmt: skip


def step_cost(emulated, given, pivots, on_step=None):
    """Counts of two steps of one epoch, once a graph is captured."""
    ends = []
    for steps in (4, 6):
        config = ef.AutoNEBConfig(
            pivots=pivots, max_pivots=pivots, cycles=((steps, 0.01),), batch_size=8, eval_points=1
        )
        with emulated.counted() as seen:
            assert ef.auto_neb(*given, config, on_step=on_step).notes == ()
        ends.append(seen)
    return ends[1] - ends[0]


@pytest.mark.parametrize("pivots", [5, 9])
def test_launches_of_a_step_small_cnn(emulated, pivots):
    _, gpu = objectives(models.digits_cnn("none", channels=(4, 4, 4)), (64, 1, 8, 8))
    unread = step_cost(emulated, gpu, pivots)
    assert unread.launches <= 2 * 100  # 100 and 1 a pivot are allowed: all are one graph
    assert (unread.synchronizations, unread.copies) == (0, 0)
    told = step_cost(emulated, gpu, pivots, on_step=lambda *_: None)
    assert (told.synchronizations, told.copies) == (2, 0)


def test_launches_of_a_step_resnet20(emulated):
    _, (obj, a, b) = objectives(models.resnet(20), (8, 3, 32, 32))
    pivots = ef.linear_path(a, b, 5).pivots
    descent = Descent(obj.with_norm("batch"), pivots, 0.01, CONFIG)
    for _ in range(3):  # of which the third is captured
        descent.step(None)
    with emulated.counted() as seen:
        descent.step(None)
    assert seen.launches <= 100
    assert (seen.synchronizations, seen.copies) == (0, 0)
    assert bool(descent.facts.isfinite().all()) and descent.note == ""
    assert not emulated.reduced_precision


class ReadsBack(nn.Module):
    """A model that reads a value back, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x / max(1.0, float(self.layer.weight.detach().abs().max())))


def test_a_model_that_refuses_capture_runs_as_it_is():
    cpu, gpu = objectives(ReadsBack(), dtype=torch.float64)
    found = ef.auto_neb(*gpu, CONFIG)
    assert "CUDA graphs were not used" in found.notes[0] and "captur" in found.notes[0]
    require_equal(found, ef.auto_neb(*cpu, CONFIG), 1e-13)


def test_divergence_is_the_error_of_the_cpu():
    config = dataclasses.replace(CONFIG, cycles=((30, 1e200),))
    errors = []
    for given in objectives(cnn("none"), dtype=torch.float64):
        with pytest.raises(DivergenceError) as caught:
            ef.auto_neb(*given, config)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_dense_evaluation_is_read_once_a_chunk(emulated, norm):
    (cpu, a, b), (gpu, *_) = objectives(cnn(norm))
    line = ef.linear_path(a, b, 3)
    there, counts = line.to("emulated"), []
    for points in (2, 6):
        with emulated.counted() as seen:
            found = ef.path_losses(gpu, there, points)
        counts.append((seen.synchronizations, seen.copies))
        expected = ef.path_losses(cpu, line, points)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["accuracy"].tolist() == expected["accuracy"].tolist()
    assert counts[0] == counts[1]  # 7 points and 15, in one chunk of 16


def test_a_loss_that_is_not_finite_is_named():
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(6, 2, generator=generator) + 0.1, torch.ones(6))
    for device in ("cpu", "emulated"):
        obj = ef.Objective(
            nn.Linear(2, 1, bias=False), lambda out, y: out[:, 0].sqrt() * y, data, device=device
        )
        ends = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], device=obj.device)
        line = ef.Path(ends)
        with pytest.warns(RuntimeWarning, match=r"2 of 3 points.*s = 0\.6.*example 0"):
            table = ef.path_losses(obj, line, [0.2, 0.6, 0.9])
        assert torch.as_tensor(table["loss"]).isfinite().tolist() == [True, False, False]
