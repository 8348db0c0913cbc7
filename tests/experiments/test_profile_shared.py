"""`entropic-fast profile` under torchrun: processes that share the work of every part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entropic_fast.table import Table

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


def profile(folder: Path, processes: int, out: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m"]
    command += ["entropic_fast.cli", "profile", "factory.py:net", "--out", out, *FEW.split()]
    command += ["--weights", "a.safetensors", "--weights", "b.safetensors", "--device", "cpu"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.timeout(400)
def test_processes_share_a_profile_which_goes_on_on_another_number_of_them(tmp_path: Path):
    (tmp_path / "factory.py").write_text(FACTORY)
    for i, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(i)
        shapes = {"1.weight": (6, 64), "1.bias": (6,), "3.weight": (10, 6), "3.bias": (10,)}
        weights = {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    for processes, out in ((1, "one"), (2, "two")):
        ended = profile(tmp_path, processes, out)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("report: ") == 1  # of one process
    for name in ("points", "eigenvalues", "curvature", "fisher", "losses", "relaxation"):
        one, two = (Table.from_csv(tmp_path / out / f"data/{name}.csv") for out in ("one", "two"))
        assert one.columns == two.columns and len(one) == len(two) > 0
        for column in one.columns:
            if column in ("residual", "top_residual", "above_floor", "matvecs"):
                continue  # what rounding is most of
            if one[column].dtype.kind != "f":
                assert list(one[column]) == list(two[column]), (name, column)
                continue
            assert two[column] == pytest.approx(
                one[column], rel=1e-3, abs=1e-4, nan_ok=True
            ), (name, column)  # fmt: skip
    kept = (tmp_path / "two/data/points.csv").read_bytes()
    (tmp_path / "two/units/spectra/B/done.json").unlink()
    ended = profile(tmp_path, 3, "two")
    assert ended.returncode == 0, ended.stderr
    assert "6 of 7 units are finished already and kept" in ended.stderr
    before, after = kept.splitlines(), (tmp_path / "two/data/points.csv").read_bytes().splitlines()
    assert before[:3] == after[:3]  # the header, A and between
