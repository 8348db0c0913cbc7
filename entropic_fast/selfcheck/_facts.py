"""What is installed, what is compiled, and which backend each op will run on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from .._torch import cuda_graphs
from .._version import __version__
from ..ops import _native as native
from ..ops import backend

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "safetensors")
# The order of a GPU's backends then follows rules: docs/gpu.md.
NOT_TIMED = "not timed on a GPU yet"
VARIABLES = (
    backend.VARIABLE, native.ISA_VARIABLE, cuda_graphs.VARIABLE, "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything `entropic-fast info` shows, as plain values that json can hold.

    Keys: "versions", "build" (of the compiled module, or {"problem": reason}), "cpu" (instruction
    sets, threads), "gpu" (one entry per device), "backends" (family -> device -> backend, or why
    none), "backend" (the setting in force), "notes" (by family) and "environment" (variables that
    are set).

    >>> sorted(collect())
    ['backend', 'backends', 'build', 'cpu', 'environment', 'gpu', 'notes', 'versions']
    """
    return {
        "versions": _versions(),
        "build": native.build_config(),
        "cpu": {
            **native.cpu_facts(),
            "torch_threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "gpu": _gpus(),
        "backend": _setting(),
        "backends": {
            family: {device: _backend(family, device) for device in ("cpu", "cuda")}
            for family in backend.families()
        },
        "notes": {
            family: NOT_TIMED for family in backend.families() if family not in backend.TIMED_ON_GPU
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _versions() -> dict[str, str]:
    versions = {"entropic_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with its build, as +cpu or +cu130
    return versions


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}{gpu.minor}",
            "memory_gib": gpu.total_memory / 2**30,
        }
        for gpu in gpus
    ]


def _setting() -> str:
    try:
        return backend.current_backend()
    except ValueError as error:
        return str(error)


def _backend(family: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        if backend.setting_for(device) != "auto":
            return backend.backend_for(family, device)
        chosen, _, failing = backend.automatic(family, device)
        return f"{chosen} ({'; '.join(failing)})" if failing else chosen
    except (backend.BackendError, ValueError) as error:
        return str(error)
