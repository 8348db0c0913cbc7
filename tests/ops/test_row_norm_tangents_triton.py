"""Family `row_norm_tangents` in Triton: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_launches import compile_launch, launches_of, row_tangents

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="no triton, or this is the interpreter's process"
)


def test_triton_agrees_with_the_formulas_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    here = Path(__file__)
    command = [
        sys.executable, "-m", "pytest", str(here.with_name("test_row_norm_tangents.py")), "-q",
        "-k", "triton and cpu and not opcheck",
        "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark",
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 35, run.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2048, 192), (3, 70, 1000)])
def test_what_is_launched_compiles_ahead_of_time(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    launches = launches_of(lambda: row_tangents(dtype, shape))
    assert len(launches) == 4
    for launch in launches:
        assert len(compile_launch(*launch, 90).asm["cubin"]) > 0
