"""Loads the compiled module `entropic_fast._C` and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

# torch first: its OpenMP runtime is then in the process already and the module shares its thread
# pool instead of starting a second one.
import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid

ISA_VARIABLE = "ENTROPIC_FAST_ISA"
Kernel = Callable[[list[Any]], None]
_SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


def _load() -> tuple[ModuleType | None, str]:
    try:
        return import_module("entropic_fast._C"), ""
    except ImportError as error:
        return None, f"entropic_fast._C cannot be imported ({error}); run `pip install .` again"


_C, problem = _load()


def use_isa(name: str | None) -> None:
    """Force the CPU instruction set: "portable", "avx2", "avx512", or None for the best there is.

    They agree to rounding (in the family `projected_step` to the bit); tests and timings use this.
    ENTROPIC_FAST_ISA sets it at import. A set that cannot run here raises ValueError.
    """
    if _C is None:
        raise invalid("ISA", "the compiled module", problem)
    try:
        _C.use_isa(name or "")
    except ValueError as error:
        raise invalid(f"ISA (argument or {ISA_VARIABLE})", "a runnable set", str(error)) from None


def build_config() -> dict[str, object]:
    """What the compiled module was built with; only {"problem": reason} if it cannot be loaded."""
    return dict(_C.build_config()) if _C is not None else {"problem": problem}


def cpu_facts() -> dict[str, object]:
    """Instruction set in use, those that can run here, and threads of a parallel region."""
    if _C is None:
        return {"isa": "none", "runnable_isas": [], "kernel_threads": 0}
    return {
        "isa": _C.current_isa(),
        "runnable_isas": _C.runnable_isas(),
        "kernel_threads": _C.default_threads(),
    }


def module() -> ModuleType:
    """The compiled module; RuntimeError with the reason if it cannot be loaded."""
    if _C is None:
        raise RuntimeError(problem)
    return _C


@cache
def _kernel(function: str, device_type: str, dtype: torch.dtype) -> Kernel:
    kernels: dict[str, Kernel] = module().kernels
    name = f"{function}_{device_type}"
    return kernels.get(f"{name}_{_SUFFIXES.get(dtype)}") or kernels[name]


def call(function: str, like: Tensor, *values: Tensor | float | None) -> None:
    """Call a kernel of csrc/registry.h, for the dtype and the device of `like`.

    `values` are in the order of the C++ struct: tensors become addresses, None address 0. Where it
    runs (number of threads, or device and stream) is added.
    """
    device = like.device
    kernel = _kernel(function, device.type, like.dtype)
    where: tuple[int, ...]
    if device.type == "cpu":
        where = (torch.get_num_threads(),)
    else:
        where = (device.index, torch.cuda.current_stream(device).cuda_stream)
    kernel([*[v.data_ptr() if isinstance(v, Tensor) else v for v in values], *where])


if _C is not None and os.environ.get(ISA_VARIABLE):
    use_isa(os.environ[ISA_VARIABLE])
