"""Family `norm_act_tangents` in Triton: interpreted, compiled ahead of time, on a GPU.

The family's own tests (test_norm_act_tangents.py) run every case on a GPU where there is one; here
most of them run under the interpreter too, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norm_act_cases import Draw, jvp_options, vjp_tangent_options
from torch import Tensor
from triton_launches import compile_launch, launches_of, tangents

from entropic_fast.ops import backend
from entropic_fast.ops.norm_act_tangents import inner_products, jvp, vjp_tangent

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# What takes the interpreter seconds; each has a quicker relative that stays.
SLOW = (
    "(many_pixels and (3 or 70))", "opcheck", "((331 or 300 or 130 or 257 or 1001) and dtype1)",
)  # fmt: skip
PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_agrees_with_the_formulas_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    here = Path(__file__)
    selected = f"triton and cpu and not ({' or '.join(SLOW)})"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(here.with_name("test_norm_act_tangents.py")), "-q",
        "-k", selected,
         *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 80, run.stdout
    assert "skipped" not in run.stdout, run.stdout


# ---- compiled ahead of time ----------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize(
    ("dtype", "shape", "archs"),
    [
        (torch.float32, (4, 256, 32), (80, 90)),
        (torch.float32, (3, 67, 17), (90,)),
        (torch.float32, (1, 1, 1), (90,)),
        (torch.float64, (8, 100, 64), (80, 90)),
    ],
)
def test_what_is_launched_compiles_ahead_of_time(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    archs: tuple[int, ...],
) -> None:
    """Kernels, types and constants exactly as the host functions launch them."""
    launches = launches_of(lambda: tangents(dtype, shape))
    assert len(launches) == 7
    for launch in launches:
        for arch in archs:
            compiled = compile_launch(*launch, arch)
            assert f"sm_{arch}" in compiled.asm["ptx"]
            assert len(compiled.asm["cubin"]) > 0


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@GPU
def test_repeated_calls_give_the_same_bits_on_a_gpu() -> None:
    backend.set_backend("triton")
    draw = Draw(torch.float32, "cuda")
    shape = (5, 3000, 40)
    u, extra = draw(*shape), draw(*shape)
    options, back = jvp_options(draw, *shape), vjp_tangent_options(draw, *shape)

    def work() -> list[Tensor]:
        return [
            *jvp(u.clone(), extra, **options), *vjp_tangent(u.clone(), extra, **back),
            inner_products(u, extra),
        ]  # fmt: skip

    first = work()
    for _ in range(20):
        assert all(map(torch.equal, first, work()))


@pytest.mark.gpu
@GPU
def test_elements_beyond_2_to_the_31_are_reached_on_a_gpu() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GB")
    backend.set_backend("triton")
    memory = torch.zeros(2**31 + 2**20, device="cuda")
    far = memory.as_strided((2, 50, 8), (2**31, 8, 1))  # the second tangent begins beyond
    draw = Draw(torch.float32, "cuda")
    u, options = draw(2, 50, 8), jvp_options(draw, 2, 50, 8)
    del options["residual"]
    expected, *_ = jvp(u.clone(), **options)
    far.copy_(u)
    actual, *_ = jvp(u.clone(), **options, out=far)
    assert torch.equal(actual, expected)
    expected, *_ = jvp(u.clone(), expected, residual=u.clone())
    actual, *_ = jvp(u.clone(), far, residual=u.clone())
    assert torch.equal(actual, expected)
