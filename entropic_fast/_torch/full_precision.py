"""The arithmetic of exact quantities: full float32, and attention that can be differentiated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class RefCountedContext:
    """A setting of the process that threads may hold at the same time.

    The first that enters sets it and the last that leaves restores it.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self._setting = setting
        self._lock, self._inside = threading.Lock(), 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._made = self._setting()
                self._made.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._made.__exit__(None, None, None)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it, and as a decorator: full float32, no autocast, no fused attention.

    On a GPU torch convolves float32 numbers in TF32 by default, with 10 bits of mantissa: curvature
    would be off by 1e-3. `torch.set_float32_matmul_precision("medium")` rounds products on CPUs
    too. Fused attention has no second derivative. An autocast within the model's forward still
    acts.
    """
    allowed = getattr(_tf32, "allowed", False)
    with no_autocast(), _plain_attention(), _float32("tf32" if allowed else "ieee"):
        yield


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within it, in this thread, `full_precision` computes float32 products on a GPU so.

    Args:
        precision: "float32", or "tf32" (10 bits of mantissa). Settings are the process's: while
            another thread is within full float32, so is this one.
    """
    before = getattr(_tf32, "allowed", False)
    _tf32.allowed = precision == "tf32"
    try:
        yield
    finally:
        _tf32.allowed = before


_tf32 = threading.local()


def no_autocast() -> AbstractContextManager[None]:
    """Within it, no autocast but those entered within it."""
    guard: AbstractContextManager[None] = torch._C._DisableAutocast()
    return guard


@RefCountedContext
@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    # Flag by flag: `sdpa_kernel` must be left in the thread that entered it.
    cuda: Any = torch.backends.cuda
    mha: Any = torch.backends.mha
    flags: list[tuple[bool, Callable[[bool], None], bool]] = [
        (mha.get_fastpath_enabled(), mha.set_fastpath_enabled, False),
        (cuda.flash_sdp_enabled(), cuda.enable_flash_sdp, False),
        (cuda.mem_efficient_sdp_enabled(), cuda.enable_mem_efficient_sdp, False),
        (cuda.cudnn_sdp_enabled(), cuda.enable_cudnn_sdp, False),
        (cuda.math_sdp_enabled(), cuda.enable_math_sdp, True),
    ]
    try:
        for _, choose, wanted in flags:
            choose(wanted)
        yield
    finally:
        for before, choose, _ in flags:
            choose(before)


class _Float32:
    """The precision of float32 products, for the process: the highest that any thread asks for."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), {"ieee": 0, "tf32": 0}
        self._current: str | None = None
        self._undo: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def __call__(self, precision: str) -> Iterator[None]:
        with self._lock:
            self._inside[precision] += 1
            try:
                self._settle()
            except BaseException:
                self._inside[precision] -= 1
                raise
        try:
            yield
        finally:
            with self._lock:
                self._inside[precision] -= 1
                self._settle()

    def _settle(self) -> None:
        wanted = next((name for name, count in self._inside.items() if count), None)
        if wanted == self._current:
            return
        self._undo()  # restore the earlier settings first, since those are saved next
        self._undo, self._current = lambda: None, None
        if wanted is not None:
            self._undo, self._current = _set_float32(wanted), wanted


_float32 = _Float32()


def _set_float32(precision: str) -> Callable[[], None]:
    """Set the precision of float32 products; returns a function that restores the settings."""
    settings = _float32_settings()
    before = [setting.fp32_precision for setting in settings]
    if precision == "ieee" and not {"tf32", "bf16"} & set(before):
        return lambda: None
    # torch rejects to read its older switches where they contradict the newer ones, which a model
    # may do in its forward (`torch.backends.cudnn.flags`): both are set.
    older = [_unless_contradicted(read) for read, *_ in _OLDER_SWITCHES]

    stored = _own_values(settings, before)

    def restore() -> None:
        for value, (_, write, *_) in zip(older, _OLDER_SWITCHES, strict=True):
            if value is not None:
                write(value)
        for setting, value in zip(settings, stored, strict=True):
            setting.fp32_precision = value

    try:
        for _, write, full, reduced in _OLDER_SWITCHES:
            write(full if precision == "ieee" else reduced)
        for i, setting in enumerate(settings):
            setting.fp32_precision = precision if i >= _ON_CPU else "ieee"
    except BaseException:
        restore()
        raise
    return restore


# (read, write, value for full float32, value for TF32)
_OLDER_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any, Any], ...] = (
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False, True),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
)
_ON_CPU = 3  # of the settings


def _unless_contradicted(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # only the newer switches count then, and they are restored
        return None


def _float32_settings() -> list[Any]:
    backends: Any = torch.backends
    settings = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        settings += [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return settings


def _own_values(settings: list[Any], values: list[str]) -> list[str]:
    """The settings' stored values: "none" where the value is inherited from a setting above.

    Written back as a stored value, it would hide later changes of the setting above. cuDNN's
    default TF32 has the lowest rank and cannot be written: afterwards it is stored.
    """
    read: Any = torch._C._get_fp32_precision_getter
    write: Any = torch._C._set_fp32_precision_setter
    above, chosen = ("generic", "mkldnn", "cuda"), []
    if {read(name, "all") for name in above} == {"none"}:
        return values
    try:
        for name in above:  # the first is above the others
            chosen.append(read(name, "all"))
            write(name, "all", "none")
        without = [setting.fp32_precision for setting in settings]
        for name in above:
            write(name, "all", "ieee")
        with_ieee = [setting.fp32_precision for setting in settings]
    finally:
        for name, value in zip(above, chosen, strict=False):
            write(name, "all", value)
    return [a if a == b else "none" for a, b in zip(without, with_ieee, strict=True)]


class double_backward_fixes(TorchFunctionMode):
    """Within it, functions whose second derivative torch has wrong are computed by others.

    The double backward pass of weight normalization (torch 2.13 and 2.15, CPU, along the first or
    last dimension) is off by its own size; the hard sigmoid has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        if func is functional.hardsigmoid:
            return hardsigmoid(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class NativeRecurrence(TorchFunctionMode):
    """Within it, recurrent layers run by torch's own kernels.

    cuDNN's have no backward pass in evaluation mode and no second derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _without_cudnn() if func in _RECURRENT else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


@RefCountedContext
@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, norms over all dimensions but one, or over all for dim = -1."""
    others = [d for d in range(v.ndim) if d != dim]
    norms = (v * v).sum(others, keepdim=dim != -1).sqrt()
    return v * (g / norms)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`, piecewise linear, with a second derivative (of 0)."""
    value = functional.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value
