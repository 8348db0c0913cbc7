"""Family `projected_step` in Triton without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_launches import compile_launch, launches_of, steps

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")

PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]


@needs_triton
def test_triton_agrees_with_the_reference_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    suite = Path(__file__).with_name("test_projected_step.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(suite), "-q", "-k", "triton and cpu", *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=suite.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 20, run.stdout
    assert "skipped" not in run.stdout, run.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_launched_compiles_ahead_of_time(dtype: torch.dtype, arch: int) -> None:
    """Kernels, types and constants exactly as the host functions launch them."""
    for size, pivot_count in ((272_474, 9), (2048, 2)):
        launches = launches_of(lambda s=size, c=pivot_count: steps(dtype, s, c))
        names = [kernel.__name__ for kernel, *_ in launches]
        assert names == [
            "sgd_kernel", "sum_kernel", "adam_kernel", "sum_kernel",
            "choose_kernel", "move_kernel", "sum_kernel",
        ]  # fmt: skip
        for launch in launches:
            compiled = compile_launch(*launch, arch)
            assert f"sm_{arch}" in compiled.asm["ptx"]
            assert len(compiled.asm["cubin"]) > 0
            if launch[0].__name__ == "sgd_kernel" and dtype == torch.float64:
                # A float64 kernel whose constants went through float32 would be off by 1e-8.
                assert "dense<9.000000e-01> : tensor<1024xf64>" in compiled.asm["ttir"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
def test_a_path_that_grows_compiles_nothing() -> None:
    updates = {
        count: [
            compile_launch(*launch, 90).hash
            for launch in launches_of(lambda c=count: steps(torch.float32, 2049, c))
            if launch[0].__name__ in ("sgd_kernel", "adam_kernel", "sum_kernel")
        ]
        for count in (2, 9, 16, 33)
    }
    assert all(hashes == updates[2] for hashes in updates.values())
    without = launches_of(lambda: steps(torch.float32, 2049, 1))[0]
    assert compile_launch(*without, 90).hash == updates[2][0]
