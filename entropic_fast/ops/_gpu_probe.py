"""Whether GPU kernels can run on this machine, found once by running a trivial one.

That a package is installed says little: Triton needs a C compiler, Python's headers and a driver
that knows its code; CUDA C++ needs code for the GPU and a driver as new as its runtime.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch

from entropic_fast.ops import _native as native

# What a failing probe says -> what to do about it.
_ADVICE = (
    (r"C compiler|\bgcc\b|\bcc\b", "install gcc, or set CC to a C compiler"),
    (r"Python\.h", "install Python's headers (python3-dev)"),
    (
        r"driver version is insufficient|PTX.*(unsupported|version)|unsupported toolchain",
        "the driver is older than the CUDA version that this was built with: update the driver",
    ),
    (r"no kernel image", "there is no code for this GPU"),
)

# Of Triton's classes, those raised before a launch; OutOfResources for shared memory and the like.
_COMPILER_ERRORS = {"CompilationError", "OutOfResources", "PTXASError", "AutotunerError"}
# Errors of its C++ part and of the compiler of its launchers have no class.
_COMPILER_TEXT = r"PassManager::run failed|C compiler|[Pp]txas|LLVM ERROR|failed to translate"


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be tried out."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(initialized) and torch.cuda.is_current_stream_capturing()


@cache
def triton_problem() -> str | None:
    """Why Triton cannot compile and launch a trivial kernel on the current GPU, or None."""
    try:
        import_module("entropic_fast.ops._triton").probe(torch.device("cuda"))
    # Triton, its compilers and the driver raise errors of many classes; the reason is passed on.
    except Exception as error:
        return f"a trivial kernel cannot be compiled and launched: {describe(error)}"
    return None


@cache
def cuda_problem() -> str | None:
    """Why the compiled CUDA code cannot run on the GPUs that torch sees, or None."""
    archs: Sequence[str] = native.build_config()["cuda_archs"]  # type: ignore[assignment]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not covered(major, minor, archs):
            return (
                f"entropic_fast._C holds code for {' '.join(archs)}, and GPU {index} is of compute "
                f"capability {major}.{minor}"
            )
    try:
        _run_step(torch.device("cuda"))
    except Exception as error:
        return f"a trivial kernel cannot be launched: {describe(error)}"
    return None


def covered(major: int, minor: int, archs: Sequence[str]) -> bool:
    """Whether code for `archs` runs on a compute capability.

    >>> [covered(*c, ["sm_80", "sm_90", "compute_90"]) for c in ((7, 5), (8, 9), (9, 0), (12, 0))]
    [False, True, True, True]
    """
    # Code of "sm_80" runs on capabilities 8.0 and up with the same major number; "compute_90",
    # which the driver compiles, on 9.0 and all newer ones.
    for arch in archs:
        kind, number = arch.split("_")
        code = (int(number[:-1]), int(number[-1]))
        if kind == "sm" and code[0] == major and code[1] <= minor:
            return True
        if kind == "compute" and code <= (major, minor):
            return True
    return False


def describe(error: BaseException) -> str:
    """An error on one line, with advice where the cause is known."""
    text = " ".join(str(error).split())
    advice = next((a for pattern, a in _ADVICE if re.search(pattern, text)), None)
    said = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    return f"{said} ({advice})" if advice else said


def is_compiler_error(error: BaseException) -> bool:
    """Whether Triton, or a compiler that it runs, could not make a kernel that fits the GPU.

    Such a kernel was not launched; after an error of the driver something may have run.
    """
    # By name: triton may not be imported yet, and its modules move between versions.
    names = {c.__name__ for c in type(error).__mro__ if c.__module__.startswith("triton")}
    return (
        bool(names & _COMPILER_ERRORS)
        or isinstance(error, (subprocess.SubprocessError, OSError))  # also of the compiler's cache
        or (isinstance(error, RuntimeError) and re.search(_COMPILER_TEXT, str(error)) is not None)
    )


def _run_step(device: torch.device) -> None:
    """One update of three parameters by the CUDA C++ kernels, awaited."""
    theta, none = torch.ones(1, 3, device=device), torch.empty(0, 3, device=device)
    rates = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    family = "entropic_fast.ops.projected_step"
    step, checks = (import_module(f"{family}.{name}") for name in ("native", "checks"))
    step.sgd_step(
        checks.SgdStep(
            theta, torch.ones_like(theta), theta.new_empty(0), rates, none,
            0.0, 0.0, 0.0, False, False,
        )
    )  # fmt: skip
    if theta.tolist() != [[0.5, 0.5, 0.5]]:
        raise RuntimeError(f"it computed {theta.tolist()} for [[0.5, 0.5, 0.5]]")
