"""Family `random_bits` in Triton: under the interpreter, and compiled ahead of time.

The family's own tests (test_random_bits.py) run every case on a GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_launches import Recorder, compile_launch

from entropic_fast.ops.random_bits.reference import KINDS

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_gives_the_same_numbers_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    here = Path(__file__)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(here.with_name("test_random_bits.py")), "-q",
         "-k", "triton and cpu and not opcheck", *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 50, run.stdout
    assert "skipped" not in run.stdout, run.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_launched_compiles_ahead_of_time(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, types and constants exactly as the host functions launch them."""
    from entropic_fast.ops.random_bits import triton as random_bits
    from entropic_fast.ops.random_bits.checks import Fill, Philox

    launches: list[Any] = []
    for name in ("fill_kernel", "philox_kernel"):
        recorder = Recorder(getattr(random_bits, name), launches)
        monkeypatch.setattr(random_bits, name, recorder)
    several, none = torch.arange(3), torch.arange(0)
    for kind, dtypes in KINDS.items():
        for dtype in dtypes:
            wide = torch.empty(1, 1, 2000, dtype=dtype)
            random_bits.fill(Fill(wide, none, 2**62 + 1, 3, 2**40, kind, ""))
            columns = torch.empty(500, 8, dtype=dtype).T[:, None]
            random_bits.fill(Fill(columns, none, 5, 2**62, 0, kind, ""))
    keys = torch.empty(2, 3, 500, dtype=torch.int64)
    random_bits.fill(Fill(keys, several, 0, 1, 0, "sort_keys", ""))
    random_bits.philox(Philox(torch.arange(30).view(3, 10), several, several, ""))
    assert len(launches) == 18
    for launch in launches:
        compiled = compile_launch(*launch, arch)
        assert f"sm_{arch}" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 0
        assert ".local" not in compiled.asm["ptx"]  # words stay in registers
