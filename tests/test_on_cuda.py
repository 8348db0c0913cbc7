"""On a GPU: every model, what a user calls, the command line, several GPUs; against the CPU.

On the emulated GPU the same checks run in tests/emulated, so that none fails here for a trivial
reason.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import device_checks
import device_runs
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", device_checks.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", device_checks.MODELS)
def test_a_model_on_a_gpu_is_the_model_on_the_cpu(name: str, dtype: torch.dtype):
    device_checks.check_model(name, dtype, DEVICE)


@pytest.mark.parametrize("name", device_checks.CHECKS)
def test_a_call_on_a_gpu_is_the_call_on_the_cpu(name: str):
    device_checks.CHECKS[name](DEVICE)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("check", device_checks.READ_NOTHING)
def test_what_reads_nothing_back(check):
    @contextlib.contextmanager
    def watched():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    check(DEVICE, watched)


@pytest.mark.timeout(900)
def test_every_stage_of_a_run(tmp_path):
    """They finish; training in TF32 ends at other weights than the CPU's."""
    device_runs.run(tmp_path / "gpu", DEVICE, *device_runs.STAGES, "reproduce")
    assert (tmp_path / "gpu" / "report.html").exists()


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one point", "two points"])
def test_profiles_of_a_model(tmp_path, seeds):
    for device in (DEVICE, "cpu"):
        device_runs.profile(tmp_path / device, tmp_path / "code.py", device, seeds)
    device_runs.assert_tables_agree(tmp_path / DEVICE, tmp_path / "cpu", slack=100)


@pytest.mark.timeout(400)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives():
    worker = Path(device_checks.__file__).with_name("device_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, "--master-port", "0", "--standalone", str(worker)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0 and ended.stdout.count("equal") == 2, ended.stderr
