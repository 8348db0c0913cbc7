"""Memory of a run of a million updates, recorded to disk and to be resumed.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_long_run.py
At full size, stored in benchmarks/results/long-run-cpu.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_long_run.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import FULL, store

import entropic_fast as ef
from entropic_fast.training.data import load

pytestmark = pytest.mark.timeout(3600)
STEPS = 1_000_000 if FULL else 3_000
RECORDS = 1000 if FULL else 10


def resident() -> int:
    """Bytes of memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def test_memory_does_not_grow_with_updates(provenance: dict[str, Any], tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    train, _ = load("digits", limit=256)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    obj = ef.Objective(net, "cross_entropy", train.tensors())
    start = obj.parameters_vector()
    path = ef.linear_path(start, start + 0.5 * torch.randn_like(start), pivots=5)
    seen: list[tuple[int, int]] = []
    begin = time.perf_counter()
    ef.relax(
        obj,
        path,
        0.5,
        ef.ProjectedSGD(0.01, 8, steps=STEPS),
        recording=ef.Recording(
            every=STEPS // RECORDS // 15 * 15,
            to=tmp_path / "run.csv",
            callback=lambda record: seen.append((record.step, resident())),
        ),
        checkpoint=tmp_path / "run.state",
    )
    seconds = time.perf_counter() - begin
    settled = [size for step, size in seen if step >= STEPS // 10]
    record = {
        **provenance,
        "updates": STEPS,
        "parameters": obj.num_params,
        "seconds": seconds,
        "records": len(seen),
        "MiB after a tenth": settled[0] / 2**20,
        "MiB at most after that": max(settled) / 2**20,
        "MiB at the end": settled[-1] / 2**20,
        "bytes of run.csv": (tmp_path / "run.csv").stat().st_size,
        "bytes of run.state": (tmp_path / "run.state").stat().st_size,
    }
    store("long-run", record, tmp_path)
    assert ef.Trajectory.load(tmp_path / "run.csv").position.shape[1] == len(seen)
    assert max(settled) - settled[0] < 64 * 2**20
