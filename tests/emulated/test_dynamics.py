"""Dynamics on the emulated GPU: the CPU's numbers, in full float32 whatever torch was told."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from relax_cases import relax_with
from torch import nn

import entropic_fast as ef
from entropic_fast._torch.full_precision import full_precision, products_in
from entropic_fast.dynamics import ForceSettings
from entropic_fast.dynamics.force import _drift as bursts
from entropic_fast.dynamics.force import _weight_norm_growth as growth
from entropic_fast.dynamics.force._point_force import point_force
from entropic_fast.training import TrainConfig, data, models

ON_PURPOSE = ("training/_train.py", "_torch/memory_format.py")
SETTINGS = bursts.ProjectedSGD(0.02, 6, project_every=2, steps=3)
LOOP = ef.Execution(backend="loop")


@pytest.fixture(params=["high", "tf32"])
def precision(request):
    """What the user told torch of float32 products; as it was afterwards."""
    setting = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), setting.fp32_precision
    if request.param == "high":
        torch.set_float32_matmul_precision("high")
    else:
        setting.fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision(before[0])
    setting.fp32_precision = before[1]


def network(norm, seed=1):
    """A convolution, normalized or not, and a layer of outputs."""
    layers = [nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)]
    if norm == "batch":
        layers.insert(1, nn.BatchNorm2d(2))
    return models.initialize(nn.Sequential(*layers), seed)


def pair(norm="batch", dtype=torch.float32):
    """An objective and a path of three pivots on the CPU, and both on the emulated GPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 8, 8, generator=generator).to(dtype)
    examples = (images, torch.randint(4, (24,), generator=generator))
    model = network(norm).to(dtype)
    cpu, gpu = (
        ef.Objective(model, "cross_entropy", examples, device=device)
        for device in ("cpu", "emulated")
    )
    a = cpu.parameters_vector()
    path = ef.linear_path(a, 1.1 * a + 0.05 * torch.randn(len(a), generator=generator).to(a), 3)
    return (cpu, path), (gpu, path.to("emulated"))


def close(found, expected, tolerance):
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def require_equal(found, expected, tolerance=1e-5):
    """The same trajectory, to rounding."""
    for name in ("position", "distance", "loss", "full_loss"):
        close(getattr(found, name), getattr(expected, name), tolerance)
    for name, values in expected.dataset_losses.items():
        close(found.dataset_losses[name], values, tolerance)
    assert torch.equal(found.diverged_at, expected.diverged_at)
    assert torch.equal(found.steps, expected.steps)


COMMON = {"lr": 0.02, "batch_size": 6, "project_every": 2, "steps": 8}


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "vmap", "steps": 4},
        {"backend": "loop", "optimizer": "nesterov", "weight_decay": 0.01},
        {"backend": "loop", "optimizer": "adam"},
        {"backend": "vmap", "batch_size": 24},
        {"backend": "vmap", "augment": data.CropAndFlip(1)},
    ],
    ids=["sgd, vmap", "nesterov, loop", "adam, loop", "full batch", "augmented"],
)
def test_relax_is_the_cpus(options, emulated):
    # Adam divides by a gradient's size, be it rounding: of a bias before normalization, for one.
    cpu, gpu = pair("none" if "optimizer" in options else "batch")
    options = {**COMMON, **options}
    found = relax_with(*gpu, [0.3, 0.6], **options)
    cycles = options["steps"] // options["project_every"]
    assert found.backend.endswith("+graphs") == (cycles > 2) and not found.notes
    assert not emulated.reduced_precision
    require_equal(found, relax_with(*cpu, [0.3, 0.6], **options))


def test_records_losses_and_a_checkpoint(tmp_path):
    cpu, gpu = pair("none", torch.float64)
    generator = torch.Generator().manual_seed(5)
    held_out = torch.randn(5, 1, 8, 8, generator=generator).double(), torch.arange(5) % 4
    options = {**COMMON, "loss_every": 4, "datasets": {"test": held_out}, "backend": "vmap"}
    whole = relax_with(*cpu, [0.3, 0.6], **options)
    require_equal(relax_with(*gpu, [0.3, 0.6], **options), whole, 1e-11)
    stopped = {
        **options,
        "checkpoint": tmp_path / "state",
        "checkpoint_every": 4,
        "record_to": tmp_path / "records.csv",
    }

    class StoppedError(Exception):
        pass

    def stop(record):
        if record.step == 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        relax_with(*gpu, [0.3, 0.6], **stopped, on_record=stop)
    relax_with(*gpu, [0.3, 0.6], **stopped)
    require_equal(ef.Trajectory.load(tmp_path / "records.csv"), whole, 1e-11)


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_replicas_that_diverge_are_dropped(backend):
    cpu, gpu = pair("none", torch.float64)
    options = {**COMMON, "lr": [0.02, 1e6, 0.01], "steps": 12, "backend": backend}
    found, expected = (relax_with(*given, [0.3, 0.5, 0.6], **options) for given in (gpu, cpu))
    assert expected.diverged_at.tolist()[1] > 0
    require_equal(found, expected, 1e-11)
    assert found.notes == expected.notes


def test_a_record_is_read_back_at_once(emulated):
    _, gpu = pair("none")
    held_out = torch.randn(5, 1, 8, 8), torch.arange(5) % 4
    seen = []
    for steps in (8, 12):
        with emulated.counted() as counts:
            relax_with(
                *gpu,
                [0.3] * 3,
                **{**COMMON, "steps": steps},
                loss_every=2,
                datasets={"test": held_out},
                backend="vmap",
            )
        seen.append(counts)
    more = (seen[1] - seen[0]).synchronizations / 2  # cycles, a record each
    assert more <= 4  # whether a replica diverged, its state, and one for each set of losses


def test_the_force_is_the_cpus(emulated):
    cpu, gpu = pair("none")
    found, expected = (
        point_force(
            *given, 0.4, ForceSettings(directions=1, complement_examples=2, step=0.05), seed=1
        )
        for given in (gpu, cpu)
    )
    assert not emulated.reduced_precision
    for name in ("stiffness", "noise", "covariance"):
        close(getattr(found, name), getattr(expected, name), 1e-3)  # eigenpairs have tol 1e-2
    assert found.gradient == pytest.approx(expected.gradient, rel=1e-4, abs=1e-6)
    assert found.noise_heterogeneity == pytest.approx(expected.noise_heterogeneity, rel=1e-3)


def test_the_force_with_batch_statistics_is_in_full_precision(precision, emulated):
    _, (obj, path) = pair()
    obj = obj.with_norm("batch").with_data(obj.tensors(), batch_size=12)
    point = point_force(
        obj,
        path,
        0.4,
        ForceSettings(directions=1, complement_examples=2, heterogeneity_draws=1, step=0.05),
    )
    growth.radial_share(obj, path, point, SETTINGS)
    assert not emulated.reduced_precision


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_drift_is_the_cpus(norm, precision, emulated):
    cpu, gpu = pair(norm)
    found, expected = (
        bursts.measure_drift(*given, [0.2, 0.6], SETTINGS, replicas=2, execution=LOOP)
        for given in (gpu, cpu)
    )
    for name in ("velocity", "raw", "order_error"):
        close(getattr(found, name), getattr(expected, name), 1e-4)
    still, expected = (
        bursts.noiseless_drift(*given, [0.2], SETTINGS) for given in (gpu, cpu)
    )  # fmt: skip
    close(still, expected, 1e-4)
    assert not emulated.reduced_precision


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_drifts_noise_is_read_back_once(norm, emulated):
    _, gpu = pair(norm)
    seen = []
    for replicas in (2, 4):
        with emulated.counted() as counts:
            settings = dataclasses.replace(SETTINGS, steps=2)
            bursts.measure_drift(*gpu, [0.2], settings, replicas=replicas, execution=LOOP)
        seen.append(counts)
    assert (seen[1] - seen[0]).synchronizations == 0


def test_scale_invariant_rows_are_the_cpus(precision, emulated):
    (cpu, _), (gpu, _) = pair()
    expected = growth.scale_invariant_rows(cpu.with_norm("batch"))
    obj = gpu.with_norm("batch")
    with emulated.counted() as seen:
        found = growth.scale_invariant_rows(obj)
    assert seen.synchronizations == 1
    assert not emulated.reduced_precision
    assert list(found) == list(expected) and expected
    assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


def test_paths_are_in_full_precision(precision, emulated):
    (cpu, path), (gpu, there) = pair()
    config = ef.AutoNEBConfig(
        pivots=3, max_pivots=3, cycles=((3, 0.01),), batch_size=8, eval_points=1
    )
    found, expected = (
        ef.auto_neb(obj, line.pivots[0], line.pivots[-1], config)
        for obj, line in ((gpu, there), (cpu, path))
    )
    relax_with(gpu, there, [0.3], **{**COMMON, "steps": 2}, loss_every=2)
    assert not emulated.reduced_precision
    close(found.path.pivots.cpu(), expected.path.pivots, 1e-5)


def test_gradients_of_noise_leave_precision_alone_between_rows():
    # A generator must not hold a setting of the process while its caller works.
    from entropic_fast.dynamics.force._gradient_noise import gradient_rows

    _, (obj, _) = pair()
    obj = obj.with_norm("batch").with_data(obj.tensors(), batch_size=8)
    before = torch.backends.cudnn.conv.fp32_precision
    for _ in gradient_rows(obj, obj.parameters_vector()):
        assert torch.backends.cudnn.conv.fp32_precision == before
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "potential",
    [ef.RingPotential(), lambda x: (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2],
    ids=["ring", "a function"],
)
def test_langevin_paths_are_the_cpus(potential):
    start = torch.tensor([[1.0, 0.1]], dtype=torch.float64).expand(5, 2)
    found, expected = (
        ef.simulate_langevin(
            potential,
            start.to(device),
            ef.LangevinIntegrator(0.3, 0.001),
            20,
            recording=ef.LangevinRecording(every=5),
        )
        for device in ("emulated", "cpu")
    )
    assert found.positions.device.type == "emulated"
    close(found.positions.cpu(), expected.positions, 1e-9)


def test_linear_mode_connectivity_is_the_cpus(emulated):
    digits, test = data.load("digits", limit=24, test_limit=10)
    config = TrainConfig(epochs=1, augment=False, batch_size=12)
    found, expected = (
        ef.linear_mode_connectivity(
            lambda: models.digits_cnn("batch", channels=(2, 2, 2)), digits.to(device), config,
            epochs=(0,), settings=ef.LineSettings(points=3, tol=0.1), eval_data=test.to(device),
        ).table
        for device in ("emulated", "cpu")
    )  # fmt: skip
    for name in ("loss", "accuracy", "test_loss", "eigenvalue", "distance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-3), name
    # Training convolves as torch does by default, and so do the trials of its memory format.
    rest = [file for file, *_ in emulated.reduced_precision if file not in ON_PURPOSE]
    assert not rest


# -- TF32 where it is asked for ----------------------------------------------------------------


def test_updates_are_in_tf32_where_asked_and_losses_are_not(emulated, tmp_path):
    _, gpu = pair("none")
    options = {**COMMON, "backend": "loop", "precision": "tf32"}
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    seen = []
    for loss_every in (None, 2):
        relax_with(*gpu, [0.3], **options, loss_every=loss_every)
        kinds = {what.split(".")[1] for *_, what in emulated.reduced_precision}
        assert kinds >= {"convolution", "convolution_backward", "addmm", "mm"}
        seen.append(emulated.reduced_precision.total())
        emulated.reduced_precision.clear()
    assert seen[0] == seen[1]
    after = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    assert after == before


def test_a_checkpoint_is_of_its_precision(tmp_path):
    _, gpu = pair("none")
    options = {**COMMON, "backend": "loop", "checkpoint": tmp_path / "state", "checkpoint_every": 2}
    relax_with(*gpu, [0.3], **options, precision="tf32")
    with pytest.raises(ef.CheckpointMismatchError, match="precision"):
        relax_with(*gpu, [0.3], **options)


def test_a_band_descends_in_tf32_where_asked(emulated):
    _, (obj, path) = pair()
    config = ef.AutoNEBConfig(
        pivots=3, max_pivots=3, cycles=((4, 0.01),), batch_size=8, eval_points=1, precision="tf32"
    )
    ef.auto_neb(obj, path.pivots[0], path.pivots[-1], config)
    assert {what.split(".")[1] for *_, what in emulated.reduced_precision} >= {
        "convolution", "convolution_backward", "addmm", "mm",
    }  # fmt: skip
    emulated.reduced_precision.clear()
    ef.path_losses(obj, path, 1)
    assert not emulated.reduced_precision


def test_a_thread_in_full_float32_keeps_others_from_tf32():
    setting = torch.backends.cudnn.conv
    seen = []

    def work():
        with full_precision():
            seen.append(setting.fp32_precision)

    with products_in("tf32"), full_precision():
        assert setting.fp32_precision == "tf32"
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert setting.fp32_precision == "tf32"
    assert seen == ["ieee"]


@pytest.mark.parametrize("call", ["relax", "AutoNEBConfig"])
def test_another_precision_is_rejected(call):
    (obj, path), _ = pair()
    with pytest.raises(ValueError, match="precision: expected"):
        if call == "relax":
            relax_with(obj, path, 0.5, **COMMON, precision="bf16")
        else:
            ef.AutoNEBConfig(precision="bf16")
