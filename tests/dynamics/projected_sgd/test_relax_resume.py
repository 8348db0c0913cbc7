"""Records stream to disk; a run killed at any moment goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path as File

import pytest
import torch
from relax_cases import relax_with

from entropic_fast._utils.atomic_io import DamagedFileError
from entropic_fast.dynamics import CheckpointMismatchError, Trajectory
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.data import CropAndFlip
from entropic_fast.training.models import digits_cnn, initialize

COLUMNS = ("position", "distance", "loss", "full_loss", "steps", "lr", "ids", "diverged_at")


def problem():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 1, 8, 8, generator=g), torch.randint(10, (40,), generator=g)
    obj = Objective(initialize(digits_cnn("batch", channels=(2, 3, 3)), 1), "cross_entropy", data)
    a = obj.parameters_vector()
    return obj, linear_path(a, a + 0.1 * torch.randn(len(a), generator=g), pivots=3)


def settings(**change):
    g = torch.Generator().manual_seed(9)
    held_out = torch.randn(6, 1, 8, 8, generator=g), torch.randint(10, (6,), generator=g)
    return {
        **dict(start=[0.2, 0.5, 0.7], lr=[0.05, 1e12, 0.02], batch_size=7, seed=3),
        **dict(project_every=3, record_every=6, loss_every=12, steps=59),
        **dict(datasets={"held_out": held_out}, datasets_every=6, checkpoint_every=9),
        **change,
    }


def same(a, b):
    for name in COLUMNS:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True
        )
    assert a.dataset_losses.keys() == b.dataset_losses.keys()
    for name, part in a.dataset_losses.items():
        torch.testing.assert_close(part, b.dataset_losses[name], rtol=0, atol=0, equal_nan=True)
    assert a.backend == b.backend


class Stopped(Exception):
    pass


def stop_at(step):
    def on_record(record):
        if record.step >= step:
            raise Stopped

    return on_record


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("backend", ["vmap", "threads"])
@pytest.mark.parametrize(
    "optimizer", [("sgd", None), ("sgd", 0.7), ("nesterov", None), ("adam", None)]
)
def test_a_broken_run_goes_on_as_the_unbroken_one(tmp_path, optimizer, backend, to_file):
    obj, path = problem()
    name, momentum = optimizer
    common = settings(optimizer=name, momentum=momentum, backend=backend)
    if name == "adam":
        common["lr"] = [0.002, 1e300, 0.001]
    whole = relax_with(obj, path, **common)
    assert whole.diverged_at[1] > 0 and whole.diverged_at[0] == -1
    saved = dict(checkpoint=tmp_path / "run.safetensors")
    if to_file:
        saved["record_to"] = tmp_path / "records.csv"
    for step in (6, 12, 30, 54):  # before the first checkpoint too
        with pytest.raises(Stopped):
            relax_with(obj, path, **common, **saved, on_record=stop_at(step))
    seen = []
    resumed = relax_with(obj, path, **common, **saved, on_record=seen.append)
    assert seen[0].step == 48  # the first after the checkpoint of update 45
    same(Trajectory.load(saved["record_to"]) if to_file else resumed, whole)
    if to_file:
        assert resumed.steps.tolist() == [0, 59] and "Trajectory.load" in resumed.notes[-1]
        same(Trajectory.from_table(whole.to_table(), vars(whole)), whole)


def test_more_steps_may_be_asked_for_and_fewer_may_not(tmp_path):
    obj, path = problem()
    file = tmp_path / "run.safetensors"
    relax_with(obj, path, **settings(checkpoint=file))
    longer = relax_with(obj, path, **settings(steps=80, checkpoint=file))
    same(longer, relax_with(obj, path, **settings(steps=80)))
    with pytest.raises(ValueError, match="steps: expected at least the checkpoint's"):
        relax_with(obj, path, **settings(steps=20, checkpoint=file))


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    obj, path = problem()
    file = tmp_path / "run.safetensors"
    relax_with(obj, path, **settings(checkpoint=file))
    for change in (dict(seed=4), dict(batch_size=6), dict(weight_decay=0.1), dict(backend="loop")):
        with pytest.raises(CheckpointMismatchError, match=f"checkpoint: .*{next(iter(change))}"):
            relax_with(obj, path, **settings(checkpoint=file, **change))
    with pytest.raises(CheckpointMismatchError, match=r"checkpoint: .*path"):
        relax_with(obj, linear_path(path.pivots[0], path.pivots[1]), **settings(checkpoint=file))
    with pytest.raises(CheckpointMismatchError, match=r"checkpoint: .*data"):
        x, y = obj.tensors()
        relax_with(obj.with_data((x + 1, y)), path, **settings(checkpoint=file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match="expected a checkpoint of relax"):
        relax_with(obj, path, **settings(checkpoint=file))


def test_a_torn_record_is_left_out_and_a_cut_file_is_refused(tmp_path):
    obj, path = problem()
    file, saved = tmp_path / "records.csv", tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        relax_with(obj, path, **settings(record_to=file, checkpoint=saved), on_record=stop_at(48))
    whole = Trajectory.load(file)
    assert whole.steps.tolist() == [0, 6, 12, 18, 24, 30, 36, 42, 48]
    data = file.read_bytes()
    for cut in range(1, 200, 13):  # within the last record's lines
        file.write_bytes(data[:-cut])
        assert Trajectory.load(file).steps.tolist() == [0, 6, 12, 18, 24, 30, 36, 42]
    file.write_bytes(b"")
    with pytest.raises(DamagedFileError, match="expected records of relax"):
        Trajectory.load(file)
    file.write_bytes(data[: len(data) // 3])
    with pytest.raises(DamagedFileError, match="bytes that were recorded"):
        relax_with(obj, path, **settings(record_to=file, checkpoint=saved))


SCRIPT = """
import sys
sys.path[:0] = [{here!r}, {support!r}]
import torch
torch.set_num_threads(1)
from test_relax_resume import problem, relax_with, settings
obj, path = problem()
folder = sys.argv[1]
relax_with(obj, path, **settings(
    steps=600, checkpoint_every=12, checkpoint=folder + "/run.safetensors",
    record_to=folder + "/records.csv", on_record=lambda r: print(r.step, flush=True)))
print("done", flush=True)
"""


def test_a_run_killed_at_random_moments_ends_as_the_unbroken_one(tmp_path):
    obj, path = problem()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = relax_with(obj, path, **settings(steps=600))
    finally:
        torch.set_num_threads(threads)
    command = [
        sys.executable,
        "-c",
        SCRIPT.format(
            here=str(File(__file__).parent), support=str(File(__file__).parents[2] / "support")
        ),
        str(tmp_path),
    ]
    rng, kills = random.Random(0), 0
    for patience in (2, 8, 3, None):  # records to wait for before the kill
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = []
        while patience is None or len(lines) < patience:
            line = process.stdout.readline()
            if not line or line == "done\n":
                break
            lines.append(line)
        if patience is not None:
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        process.stdout.close()
        status = process.wait(timeout=60)
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    assert kills >= 3 and status == 0
    same(Trajectory.load(tmp_path / "records.csv"), whole)
    assert json.loads((tmp_path / "records.json").read_text())["notes"] == list(whole.notes)


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from entropic_fast import *
x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
obj = Objective(torch.nn.Linear(3, 1), "mse", (x, x[:, :1]))
a = obj.parameters_vector()
def go(steps):
    sgd = ProjectedSGD(0.01, 4, project_every=1, steps=steps)
    relax(obj, linear_path(a, a + 1), 0.5, sgd, replicas=4, recording=Recording(to=sys.argv[1]),
          checkpoint=Checkpointing(sys.argv[2], 500), execution=Execution(backend="vmap"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = go(400)
print(go(8 * 400) - before)
"""


def test_memory_does_not_grow_with_the_number_of_updates(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "r.csv"), str(tmp_path / "c.safetensors")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    # 2,800 more records of 4 replicas would take over 10 MB as tensors; KiB here.
    assert int(run.stdout) < 3000
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 4 * 3201


def test_a_resumed_run_is_augmented_as_an_unbroken_one(tmp_path):
    obj, path = problem()
    change = dict(augment=CropAndFlip(1), checkpoint=tmp_path / "state")
    unbroken = relax_with(obj, path, **settings(augment=CropAndFlip(1)))
    with pytest.raises(Stopped):
        relax_with(obj, path, **settings(**change), on_record=stop_at(30))
    with pytest.raises(CheckpointMismatchError, match="augment"):
        relax_with(obj, path, **settings(**{**change, "augment": CropAndFlip(2)}))
    same(relax_with(obj, path, **settings(**change)), unbroken)
