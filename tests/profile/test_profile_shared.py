"""`entropic-fast profile` under torchrun: processes that share the work of every part."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hidden_gpus import HIDDEN
from safetensors.torch import save_file

from entropic_fast._utils.table import Table

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
FACTORY = """
import torch


def net():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.Tanh(), torch.nn.Linear(6, 10)
    )
"""
FEW = (
    "--data digits --examples 50 --points 3 --probes 4 --density-probes 2 --density-steps 6 "
    "--eigenvalues 2 --tol 1e-5 --pivots 5 --path-steps 8 --replicas 2 --steps 30"
)


def command(processes: int, out: str, settings: str) -> list[str]:
    found = [sys.executable, "-m"]
    if processes > 1:
        found += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    found += [
        "entropic_fast.cli",
        "profile",
        "factory.py:net",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    return [*found, "--weights", "a.safetensors", "--weights", "b.safetensors", *settings.split()]


def start(folder: Path, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **HIDDEN, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(folder: Path, *arguments: Any) -> tuple[str, str]:
    started = start(folder, *arguments)
    out, err = started.communicate(timeout=200)
    assert started.returncode == 0, err
    assert out.count("report: ") == 1  # of one process
    return out, err


def assert_alike(one: Path, two: Path) -> None:
    for name in ("points", "eigenvalues", "curvature", "fisher", "losses", "relaxation"):
        a, b = (Table.from_csv(out / f"data/{name}.csv") for out in (one, two))
        assert a.columns == b.columns and len(a) == len(b) > 0
        for column in a.columns:
            if column in ("residual", "top_residual", "above_floor", "matvecs"):
                continue  # what rounding is most of
            if a[column].dtype.kind != "f":
                assert list(a[column]) == list(b[column]), (name, column)
                continue
            close = pytest.approx(a[column], rel=1e-3, abs=1e-4, nan_ok=True)
            assert b[column] == close, (name, column)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "factory.py").write_text(FACTORY)
    for i, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(i)
        shapes = {"1.weight": (6, 64), "1.bias": (6,), "3.weight": (10, 6), "3.bias": (10,)}
        weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
def test_a_shared_profile_of_which_a_process_was_killed_goes_on_on_another_number(folder: Path):
    finish(folder, 1, "one", FEW)
    started = start(folder, 2, "two", FEW)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    until = time.monotonic() + 100
    while not (folder / "two/tasks/path/band/done.json").exists():
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.01)
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, err = started.communicate(timeout=100)
    assert started.returncode != 0 and "SIGKILL" in err  # as torchrun says, who ends the others
    _, err = finish(folder, 3, "two", FEW)
    assert "of 7 tasks are finished already and kept" in err
    assert_alike(folder / "one", folder / "two")
