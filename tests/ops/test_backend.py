"""The choice of backend is explicit: forced ones run or raise, fallbacks are announced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.random_bits import streams as random

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.set_backend(None)
    yield
    backend.set_backend(None)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_auto_takes_the_compiled_kernels_on_the_cpu() -> None:
    assert backend.current_backend() == "auto"
    assert backend.backend_for("projected_step", "cpu") == "cpp"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpp"):
        backend.set_backend("fortran")
    with pytest.raises(ValueError, match=r"family: expected one of .*step.*got 'leap'"):
        backend.backend_for("leap", "cpu")
    monkeypatch.setenv(backend.VARIABLE, "fortran")
    with pytest.raises(ValueError, match="ENTROPIC_FAST_BACKEND: expected one of"):
        backend.backend_for("projected_step", "cpu")


def test_environment_forces_a_backend_and_the_call_overrides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.backend_for("projected_step", "cpu") == "reference"
    backend.set_backend("cpp")
    assert backend.backend_for("projected_step", "cpu") == "cpp"
    backend.set_backend("auto")
    assert backend.current_backend() == "auto"
    backend.set_backend(None)
    assert backend.backend_for("projected_step", "cpu") == "reference"


def test_backend_named_in_a_call_raises_where_it_cannot_run() -> None:
    with pytest.raises(backend.BackendError, match="runs on cpu tensors, not on cuda"):
        backend.backend_for("projected_step", "cuda", "cpp")
    backend.set_backend("cpp")
    with pytest.raises(backend.BackendError, match="runs on cpu tensors, not on cuda"):
        backend.implementation("projected_step", "cuda", "cpp")


@pytest.mark.filterwarnings("ignore:entropic_fast runs its slow reference")
def test_forced_cpp_leaves_tensors_on_a_gpu_to_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = backend.backend_for("projected_step", "cuda")
    backend.set_backend("cpp")
    assert backend.setting_for("cuda") == "auto" and backend.setting_for("cpu") == "cpp"
    assert backend.backend_for("projected_step", "cuda") == expected
    backend.set_backend("reference")
    assert backend.setting_for("cuda") == backend.setting_for("cpu") == "reference"


@NO_GPU
def test_gpu_backend_without_a_gpu_raises_and_changes_nothing() -> None:
    backend.set_backend("reference")
    with pytest.raises(backend.BackendError, match=r"backend 'cuda' cannot run: .*CUDA"):
        backend.set_backend("cuda")
    assert backend.current_backend() == "reference"


@NO_GPU
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(backend.BackendError, match="backend 'triton' cannot run"):
        backend.set_backend("triton")
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(backend.BackendError, match="'triton' was asked for but cannot run 'proj"):
        backend.backend_for("projected_step", "cpu")
    with pytest.raises(backend.BackendError, match="'triton' was asked for but cannot run 'rando"):
        random.rademacher((3,), 0)


def test_interpreted_triton_is_forced_on_the_cpu_too() -> None:
    code = (
        "from entropic_fast.ops import backend; import sys;"
        "assert backend.backend_for('projected_step', 'cpu') == 'triton';"
        "assert 'triton' not in sys.modules"
    )
    run = python(code, TRITON_INTERPRET="1", ENTROPIC_FAST_BACKEND="triton")
    assert run.returncode == 0, run.stderr


MISSING_MODULE = """
import sys, warnings
sys.modules["entropic_fast._C"] = None  # importing it now fails
import torch
from rich.console import Console
from entropic_fast.cli._info import render
from entropic_fast.ops.random_bits import streams
from entropic_fast.ops import _native as native, backend
from entropic_fast.ops.projected_step import sgd_step
assert "cannot be imported" in native.problem, native.problem
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        theta = torch.ones(2)
        sgd_step(theta, torch.ones(2), lr=0.5)
assert theta.tolist() == [0.5, 0.5]
told = [str(w.message) for w in caught if "slow reference implementation" in str(w.message)]
assert len(told) == 1 and "cannot be imported" in told[0], told
try:
    backend.set_backend("cpp")
except backend.BackendError as error:
    assert "cannot be imported" in str(error)
else:
    raise AssertionError("a missing module was forced")
console = Console(record=True, width=200, quiet=False)
render(console)
text = console.export_text()
assert "missing: entropic_fast._C cannot be imported" in text and "reference" in text, text
"""


def test_missing_module_falls_back_visibly_and_keeps_the_reason() -> None:
    run = python(MISSING_MODULE, ENTROPIC_FAST_BACKEND="auto")
    assert run.returncode == 0, run.stdout + run.stderr


def test_torch_governs_the_threads_of_the_kernels() -> None:
    """One OpenMP runtime in the process: its default follows torch.set_num_threads."""
    if not native.build_config()["openmp"]:
        pytest.skip("built without OpenMP")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert native.module().default_threads() == threads
    finally:
        torch.set_num_threads(before)
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line]
        assert len({line for line in lines if line.endswith("libgomp.so.1")}) == 1, lines


def test_instruction_set_is_forced_by_the_environment() -> None:
    code = "from entropic_fast.ops import _native as native; print(native.module().current_isa())"
    run = python(code, ENTROPIC_FAST_ISA="portable")
    assert run.stdout.strip() == "portable", run.stderr
    run = python(code, ENTROPIC_FAST_ISA="mmx")
    assert run.returncode != 0
    assert "instruction set 'mmx' cannot run here; expected one of: portable" in run.stderr
