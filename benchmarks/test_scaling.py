"""Strong and weak scaling over processes of one thread, beside what the cost model expects.

Small by default, so that it runs with the tests; at full size, stored in
benchmarks/results/scaling-cpu.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_scaling.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rounds import FULL, store

WORKER = Path(__file__).with_name("scaling_worker.py")
EXAMPLES, COLUMNS, ROUNDS = (192, 4, 3) if FULL else (16, 2, 1)
PROCESSES = (1, 2, 4) if FULL else (1, 2)
pytestmark = pytest.mark.timeout(1800)


def timed(processes: int, examples: int, folder: Path) -> dict[str, Any]:
    out = folder / f"{processes}-{examples}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(WORKER), str(out)]
    command += [str(n) for n in (examples, COLUMNS, ROUNDS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_scaling_over_processes(provenance: dict[str, Any], tmp_path: Path) -> None:
    strong = {str(w): timed(w, EXAMPLES, tmp_path) for w in PROCESSES}
    weak = {str(w): timed(w, w * EXAMPLES // 4, tmp_path) for w in PROCESSES if FULL}
    record = {
        **provenance,
        "model": "resnet20",
        "threads a process": 1,
        "examples": EXAMPLES,
        "columns": COLUMNS,
        "rounds": ROUNDS,
        "strong": strong,
        "weak, examples a process": EXAMPLES // 4,
        "weak": weak,
    }
    store("scaling", record, tmp_path)
    for found in strong.values():
        assert all(row["median"] > 0 < row["expected"] for row in found["quantities"].values())
