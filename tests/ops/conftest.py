"""Where kernels run in the tests of every family, and what is restored after each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import emulated_cuda
import pytest
import torch

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend


def places(emulated: str | None) -> list[object]:
    """Backends and devices: reference and C++, on a GPU Triton, and CUDA C++ if there is any.

    Args:
        emulated: a family with CUDA C++, which then also runs on the emulated GPU.
    """
    found = [
        pytest.param(("reference", "cpu"), id="reference-cpu"),
        pytest.param(("cpp", "cpu"), id="cpp-cpu"),
        *([emulated_cuda.PLACE] if emulated else []),
    ]
    if torch.cuda.is_available():
        on_gpu = ("reference", "cuda", "triton") if emulated else ("reference", "triton")
        found += [
            pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu)
            for name in on_gpu
        ]
    if os.environ.get("TRITON_INTERPRET") == "1":  # see the tests named *_triton.py
        found.append(pytest.param(("triton", "cpu"), id="triton-cpu"))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with a `place` everywhere, unless their module defines `PLACES`."""
    if "place" in metafunc.fixturenames and not hasattr(metafunc.module, "PLACES"):
        emulated = getattr(metafunc.module, "CUDA_FAMILY", None)
        metafunc.parametrize("place", places(emulated), indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device, with one backend forced on it."""
    name, device = request.param
    if name == "emulated":
        name = emulated_cuda.stand_in(request.module.CUDA_FAMILY, monkeypatch)
    backend.set_backend(name)
    return str(device)


@pytest.fixture(autouse=True)
def settings_are_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    backend.set_backend(None)
    native.use_isa(None)
    torch.set_num_threads(threads)
