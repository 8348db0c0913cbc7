"""Which implementation of each op runs.

A *family* is a group of ops with one implementation module per backend. `auto` uses the first
usable backend of `PREFERENCE` for the tensor's device.

A backend forced with `set_backend` or ENTROPIC_FAST_BACKEND runs or raises `BackendError` with the
reason. It applies to the kind of device that it is for; tensors on the other kind (a GPU program's
random draws on the CPU) use `auto`. If it cannot run on this machine at all, or has no
implementation of a family, every op that it applies to raises. A backend named in a call
(`backend=`) runs or raises on any device.

Under `auto` a compiler's failure never reaches the caller: a backend that cannot run a trivial
kernel is skipped. If a kernel fails later, its in-place arguments are restored and the call falls
back to the next backend. Either is reported once, as a warning with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid, shown
from entropic_fast._utils.devices import is_gpu
from entropic_fast.ops import _gpu_probe as gpu_probe
from entropic_fast.ops import _native as native

VARIABLE = "ENTROPIC_FAST_BACKEND"
NAMES = ("auto", "reference", "cpp", "cuda", "triton")

# Where a family has both, CUDA C++ before Triton until a timing on a GPU says otherwise. Both make
# the same launches (`projected_step`: two per update, three per projection). CUDA C++ makes all
# launches of an op in one call; Triton binds 5 to 20 arguments in Python for each. Within a CUDA
# graph the host's work costs nothing, and the two are about equal. docs/gpu.md has the rule in
# full.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# Families whose implementations for GPUs have been timed on one; benchmarks/results has the record.
TIMED_ON_GPU: frozenset[str] = frozenset()

# family -> backend -> module that implements it, imported when first used.
_families: dict[str, dict[str, str]] = {}
# family -> function -> names of the arguments that it writes in place.
_writes: dict[str, dict[str, tuple[str, ...]]] = {}
# family -> functions whose first launch may have written when a later one is compiled.
_several: dict[str, frozenset[str]] = {}
# (family, backend, device type) -> why a first call failed.
_failed: dict[tuple[str, str, str], str] = {}
_guards: dict[tuple[str, str, str], ModuleType] = {}
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


def register_family(family: str, *, cuda: bool = False, several: Sequence[str] = ()) -> None:
    """Declare a family, whose package holds a module for each backend, with CUDA C++ if `cuda`.

    `several` are functions that make another launch after one that has written to an argument.
    """
    package = f"{__package__}.{family}"
    modules = {"reference": "reference", "cpp": "native", "cuda": "native", "triton": "triton"}
    _families[family] = {
        backend: f"{package}.{module}"
        for backend, module in modules.items()
        if cuda or backend != "cuda"
    }
    _writes[family], _several[family] = {}, frozenset(several)
    _choose.cache_clear()


def declare_writes(family: str, function: str, arguments: Sequence[str]) -> None:
    """Declare which arguments a function of a family's modules writes in place."""
    _writes[family][function] = tuple(arguments)


def families() -> tuple[str, ...]:
    """Registered families, in order of registration."""
    return tuple(_families)


def modules_of(family: str) -> dict[str, str]:
    """A family's implementation modules, by backend name."""
    return dict(_families[family])


def set_backend(name: str | None) -> None:
    """Force one backend for every op: "reference", "cpp", "cuda" or "triton".

    "cpp" applies to tensors outside GPUs, "cuda" and "triton" (unless interpreted) to tensors
    outside the CPU; other tensors use "auto", which chooses per device. None returns to the
    environment variable ENTROPIC_FAST_BACKEND, by default "auto".

    Raises:
        ValueError: `name` is none of these.
        BackendError: that backend cannot run on this machine; the setting stays as it was.

    >>> set_backend("reference")
    >>> backend_for("projected_step", "cpu")
    'reference'
    >>> set_backend(None)
    """
    global _forced
    if name is not None:
        _check_name("backend", name)
        reason = _unusable_anywhere(name)
        if reason:
            raise BackendError(f"backend {name!r} cannot run: {reason}")
    _forced = name
    _choose.cache_clear()


def forced() -> str | None:
    return _forced


def current_backend() -> str:
    """The setting in force: a backend's name, or "auto"."""
    if _forced is not None:
        return _forced
    return _check_name(VARIABLE, os.environ.get(VARIABLE) or "auto")


def setting_for(device: torch.device | str) -> str:
    """The setting in force for tensors of a device: "auto" where a forced backend is for others."""
    wanted = current_backend()
    if wanted == "cpp":
        elsewhere = is_gpu(device)
    else:
        compiled = wanted == "cuda" or (wanted == "triton" and not _triton_interprets())
        elsewhere = compiled and torch.device(device).type == "cpu"
    # Where it can run on no tensor at all, the op is to say so.
    return "auto" if elsewhere and _unusable_anywhere(wanted) is None else wanted


def backend_for(family: str, device: torch.device | str, setting: str | None = None) -> str:
    """The backend that runs `family` on tensors of `device`; `setting` for the one in force.

    Raises:
        ValueError: no such family or setting.
        BackendError: the forced backend cannot run there.

    >>> backend_for("projected_step", "cpu") in ("cpp", "reference")
    True
    """
    wanted = setting_for(device) if setting is None else _check_name("backend", setting)
    return _choose(family, torch.device(device).type, wanted)


def implementation(
    family: str, device: torch.device | str, setting: str | None = None
) -> ModuleType:
    """The module that implements `family` on `device`, imported if need be.

    Under "auto" on a GPU the result wraps the module, to fall back where a kernel fails.
    """
    wanted = setting_for(device) if setting is None else setting
    device_type = torch.device(device).type
    chosen = backend_for(family, device_type, wanted)
    if wanted != "auto" or chosen not in _GUARDED:
        name = _families[family][chosen]
        return sys.modules.get(name) or import_module(name)
    key = (family, chosen, device_type)
    if key not in _guards:
        _guards[key] = _Guard(*key)
    return _guards[key]


def unusable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type`, or None if it can."""
    if backend == "reference":
        return None
    if backend in ("cpp", "cuda"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        if device_type != wanted:
            return f"it runs on {wanted} tensors, not on {device_type}"
        return _unusable_anywhere(backend)
    reason = _unusable_anywhere("triton")
    if reason is None and device_type == "cpu" and not _triton_interprets():
        return "it runs on cpu tensors only under Triton's interpreter (TRITON_INTERPRET=1)"
    if reason is None and device_type not in ("cpu", "cuda"):
        return f"it runs on cuda tensors, not on {device_type}"
    return reason


def _check_name(argument: str, name: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise invalid(argument, "one of " + ", ".join(NAMES), shown(name))
    return name


def _unusable_anywhere(backend: str) -> str | None:
    return _absent(backend) or _failing(backend)


def _failing(backend: str) -> str | None:
    """Why a backend that is there cannot run, found by trying."""
    if backend == "triton" and not _triton_interprets() and not gpu_probe.capturing():
        return gpu_probe.triton_problem()
    if backend == "cuda" and not gpu_probe.capturing():
        return gpu_probe.cuda_problem()
    return None


def _absent(backend: str) -> str | None:
    if backend in ("cpp", "cuda") and native.problem:
        return native.problem
    if backend == "cuda":
        config = native.build_config()
        if not config["cuda"]:
            return f"entropic_fast._C was built without CUDA ({config['cuda_compiler']})"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not _triton_interprets():
            return "torch sees no CUDA device and TRITON_INTERPRET=1 is not set"
    return None


def _triton_interprets() -> bool:
    # Triton reads the variable when a kernel is defined, so it has to be set from the start.
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _choose(family: str, device_type: str, setting: str) -> str:
    if family not in _families:
        raise invalid("family", "one of " + ", ".join(_families), shown(family))
    modules = _families[family]
    if setting != "auto":
        reason = _unusable_anywhere(setting) or unusable(setting, device_type)
        if setting not in modules:
            reason = f"{family!r} has no such implementation"
        if reason:
            raise BackendError(
                f"backend {setting!r} was asked for but cannot run {family!r} on {device_type} "
                f"tensors: {reason}. Use set_backend('auto') or unset {VARIABLE}."
            )
        return setting
    backend, reasons, failing = automatic(family, device_type)
    _warn_of_fallback(backend, device_type, reasons, failing)
    return backend


def automatic(family: str, device_type: str) -> tuple[str, list[str], list[str]]:
    """The backend that "auto" uses for a family, without a warning.

    Returns also why each preferred backend was passed over, and of these reasons those of backends
    that are there and fail. BackendError if nothing can run it.
    """
    modules = _families[family]
    reasons: list[str] = []
    failing: list[str] = []
    for backend in PREFERENCE.get(device_type, ("reference",)):
        reason = unusable(backend, device_type) if backend in modules else "not implemented"
        fails = reason is not None and backend in modules and _absent(backend) is None
        if reason is None and (family, backend, device_type) in _failed:
            reason, fails = _failed[family, backend, device_type], True
        if reason is None:
            return backend, reasons, failing
        reasons.append(f"{backend}: {reason}")
        failing += reasons[-1:] if fails else []
    raise BackendError(f"no backend can run {family!r} on {device_type} tensors: {reasons}")


def _warn_of_fallback(
    backend: str, device_type: str, reasons: list[str], failing: list[str]
) -> None:
    """Warn once about backends that fail, or that only the slow reference is there."""
    news = [reason for reason in failing if (reason, device_type) not in _warned]
    _warned.update((reason, device_type) for reason in news)
    slow = backend == "reference" and bool(reasons) and (backend, device_type) not in _warned
    if slow or news:
        _warned.add(("reference", device_type))
    if news:
        text = (
            f"entropic_fast skips backends that fail on {device_type} tensors: {'; '.join(news)}. "
            "It falls back to the next one (`entropic-fast info` lists them); set_backend or "
            f"{VARIABLE} forces one."
        )
    elif slow:
        text = f"entropic_fast runs its slow reference implementation on {device_type}: "
        text += "; ".join(reasons)
    else:
        return
    warnings.warn(text, RuntimeWarning, stacklevel=2)


# ---- calls that fail -----------------------------------------------------------------------------

_GUARDED = ("triton", "cuda")  # compiled, or first run, when they are called


# Whatever a function's first call for a dtype raises is a failure of the backend, except errors in
# arguments and a lack of memory. Triton compiles again for other sizes and options: what its
# compiler raises in later calls is one too. Nothing has been written then, except by functions of
# `several` launches: those are watched, with their in-place arguments copied, at every first call
# for such sizes and options.
class _Guard(ModuleType):
    """A family's module, whose functions fall back to the next backend's where kernels fail."""

    def __init__(self, family: str, backend: str, device_type: str) -> None:
        super().__init__(f"{family} by {backend}")
        self._key = (family, backend, device_type)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        proven: dict[Any, Callable[..., Any]] = {}
        several = self._key[1] == "triton" and name in _several[self._key[0]]

        def call(arguments: tuple[Any, ...]) -> Any:
            dtypes = tuple(a.dtype for a in arguments[:2] if isinstance(a, Tensor))
            function = proven.get(dtypes)
            if function is None:
                result, function = self._watched(name, arguments)
                if function is None:
                    return result
                proven[dtypes] = function
                if several:
                    proven[_specialization(arguments)] = function
                return result
            if several:
                key = _specialization(arguments)
                if key in proven:
                    return function(arguments)
                result, function = self._watched(name, arguments, only_compiler=True)
                if function is not None:
                    proven[key] = function
                return result
            try:
                return function(arguments)
            except Exception as error:
                if not gpu_probe.is_compiler_error(error):
                    raise
                return self._fall_back(name, arguments, error)

        setattr(self, name, call)
        return call

    def _watched(
        self, name: str, arguments: tuple[Any, ...], only_compiler: bool = False
    ) -> tuple[Any, Callable[..., Any] | None]:
        """The result; and the backend's function, unless another backend had to compute it."""
        family, backend, _ = self._key
        tensors = (getattr(arguments, argument) for argument in _writes[family].get(name, ()))
        written = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        before = [tensor.clone() for tensor in written]
        try:
            function = getattr(import_module(_families[family][backend]), name)
            return function(arguments), function
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if only_compiler and not gpu_probe.is_compiler_error(error):
                raise
            _put_back(written, before, error)
            return self._fall_back(name, arguments, error), None

    def _fall_back(self, name: str, arguments: tuple[Any, ...], error: Exception) -> Any:
        """The call by the next backend, which has the family from now on."""
        family, _, device_type = self._key
        _failed[self._key] = f"{name}: {gpu_probe.describe(error)}"
        _choose.cache_clear()
        return getattr(implementation(family, device_type, "auto"), name)(arguments)


def _specialization(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that Triton may compile another kernel for: at least as fine as its own key."""
    return tuple(map(_specialized, arguments))


def _specialized(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() % 16 == 0
        return argument.dtype, tuple(argument.shape), argument.device, aligned
    if isinstance(argument, int) and not isinstance(argument, bool):
        return argument == 1, argument % 16 == 0, argument.bit_length() // 32
    return tuple(argument) if isinstance(argument, list) else argument


def _put_back(written: list[Tensor], before: list[Tensor], error: Exception) -> None:
    """What a failed call may have written in part, as it was."""
    try:
        for tensor, values in zip(written, before, strict=True):
            tensor.copy_(values)
    except RuntimeError:  # the device itself is lost, as after an invalid address
        raise error from None
