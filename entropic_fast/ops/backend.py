"""Which implementation of each op runs: chosen openly, never quietly.

A *family* is a group of ops with one implementation module per backend. `auto` takes the first
usable of `PREFERENCE` for the tensor's device. A backend forced with `set_backend` or the
environment variable ENTROPIC_FAST_BACKEND runs or raises `BackendError` with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from entropic_fast.checks import fail
from entropic_fast.ops import native

VARIABLE = "ENTROPIC_FAST_BACKEND"
NAMES = ("auto", "reference", "cpp", "cuda", "triton")

# Triton before CUDA C++ until a measurement says otherwise.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}

# family -> backend -> module that implements it, imported when first used.
_families: dict[str, dict[str, str]] = {}
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


def register_family(family: str, modules: Mapping[str, str]) -> None:
    """Declare a family's implementation modules, by backend name."""
    _families[family] = dict(modules)
    _choose.cache_clear()


def families() -> tuple[str, ...]:
    """Registered families, in order of registration."""
    return tuple(_families)


def set_backend(name: str | None) -> None:
    """Force one backend for every op: "reference", "cpp", "cuda" or "triton".

    "auto" chooses per device; None returns to the environment variable ENTROPIC_FAST_BACKEND,
    which is "auto" when unset.

    Raises:
        ValueError: `name` is none of these.
        BackendError: that backend cannot run on this machine; the setting stays as it was.

    >>> set_backend("reference")
    >>> backend_for("step", "cpu")
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


def current_backend() -> str:
    """The setting in force: a backend's name, or "auto"."""
    if _forced is not None:
        return _forced
    return _check_name(VARIABLE, os.environ.get(VARIABLE) or "auto")


def backend_for(family: str, device: torch.device | str, setting: str | None = None) -> str:
    """The backend that runs `family` on tensors of `device`; `setting` for the one in force.

    Raises:
        ValueError: no such family or setting.
        BackendError: the forced backend cannot run there.

    >>> backend_for("step", "cpu") in ("cpp", "reference")
    True
    """
    wanted = current_backend() if setting is None else _check_name("backend", setting)
    return _choose(family, torch.device(device).type, wanted)


def implementation(
    family: str, device: torch.device | str, setting: str | None = None
) -> ModuleType:
    """The module that implements `family` on `device`, importing it if need be."""
    return import_module(_families[family][backend_for(family, device, setting)])


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
    if name not in NAMES:
        raise fail(argument, "one of " + ", ".join(NAMES), repr(name))
    return name


def _unusable_anywhere(backend: str) -> str | None:
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
        raise fail("family", "one of " + ", ".join(_families), repr(family))
    modules = _families[family]
    if setting != "auto":
        reason = unusable(setting, device_type)
        if setting not in modules:
            reason = f"{family!r} has no such implementation"
        if reason:
            raise BackendError(
                f"backend {setting!r} was asked for but cannot run {family!r} on {device_type} "
                f"tensors: {reason}. Use set_backend('auto') or unset {VARIABLE}."
            )
        return setting
    reasons: list[str] = []
    for backend in PREFERENCE.get(device_type, ("reference",)):
        reason = unusable(backend, device_type) if backend in modules else "not implemented"
        if reason is None:
            _warn_of_fallback(backend, device_type, reasons)
            return backend
        reasons.append(f"{backend}: {reason}")
    raise BackendError(f"no backend can run {family!r} on {device_type} tensors: {reasons}")


def _warn_of_fallback(backend: str, device_type: str, reasons: list[str]) -> None:
    """Says once for each device that the slow reference runs because nothing faster can."""
    if backend != "reference" or not reasons or (backend, device_type) in _warned:
        return
    _warned.add((backend, device_type))
    warnings.warn(
        f"entropic_fast runs its slow reference implementation on {device_type}: "
        + "; ".join(reasons),
        RuntimeWarning,
        stacklevel=2,
    )
