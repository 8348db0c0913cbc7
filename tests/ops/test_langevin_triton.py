"""Family `langevin` in Triton: under the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from langevin_kernel_cases import advanced, kinds, start
from triton_launches import compile_launch, langevin_steps, launches_of

from entropic_fast.ops import backend
from entropic_fast.ops.langevin import backend_of

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# What takes the interpreter seconds.
SLOW = ("opcheck", "diverges", "(without_noise and euler)", "(cut_anywhere and euler)")
PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_agrees_with_the_reference_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    here = Path(__file__)
    files = [here.with_name(f"test_langevin_{name}.py") for name in ("steps", "normal")]
    selected = f"triton and cpu and not ({' or '.join(SLOW)})"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, files), "-q", "-k", selected, *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 35, run.stdout
    assert "skipped" not in run.stdout, run.stdout


# ---- compiled ahead of time ----------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize(
    ("dtype", "archs"), [(torch.float32, (80, 90)), (torch.float64, (90,))], ids=str
)
def test_what_is_launched_compiles_ahead_of_time(
    dtype: torch.dtype, archs: tuple[int, ...]
) -> None:
    """Kernels, types and constants exactly as the host functions launch them."""
    launches = launches_of(lambda: [langevin_steps(*kind, dtype) for kind in kinds()])
    assert len(launches) == 15
    for launch in launches:
        for arch in archs:
            compiled = compile_launch(*launch, arch)
            assert f"sm_{arch}" in compiled.asm["ptx"]
            assert len(compiled.asm["cubin"]) > 0
            # Particles stay in registers: nothing goes to local memory.
            assert ".local" not in compiled.asm["ptx"]


def test_on_a_cpu_without_the_interpreter_triton_is_refused() -> None:
    if INTERPRETED:
        assert backend_of(16, "cpu", "triton") == "triton"
    else:
        with pytest.raises(backend.BackendError, match="'triton' was asked for but cannot run"):
            backend_of(2, "cpu", "triton")


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_a_long_run_on_a_gpu_is_that_on_the_cpu(potential: str, scheme: str) -> None:
    """Differences of rounding stay small: the flow across contracts, that along is neutral."""
    x, v = start(20_001, 2, scheme, torch.float64)
    there = x.cuda(), None if v is None else v.cuda()
    options = {"steps": 500, "dt": 0.005, "first_particle": 1}
    cpu = advanced(x, v, potential, scheme, **options)
    cuda = advanced(*there, potential, scheme, **options)
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-8, atol=1e-8)
    again = advanced(*there, potential, scheme, **options)
    assert torch.equal(cuda, again)
