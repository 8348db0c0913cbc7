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


class Shared:
    """A setting of the whole process that threads may hold at the same time.

    The first that enters makes it and the last that leaves undoes it, so that none restores what
    another still needs.

    >>> states = []
    >>> @contextlib.contextmanager
    ... def setting():
    ...     states.append("set")
    ...     yield
    ...     states.append("restored")
    >>> shared = Shared(setting)
    >>> with shared(), shared():
    ...     states
    ['set']
    >>> states
    ['set', 'restored']
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
def exact_math() -> Iterator[None]:
    """Within it, and as a decorator: no TF32, autocast or fused attention. Restores what was set.

    On a GPU torch convolves float32 numbers in TF32 unless told otherwise, with 10 bits of
    mantissa: curvature would be off by 1e-3. Fused attention has no second derivative, so
    attention is computed by plain matrix products. An autocast that surrounds the call would
    round to half precision; a model's own, within its forward, still acts.

    >>> with exact_math():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with (
        no_autocast(),
        _plain_attention(),
        _full_float32() if cuda else contextlib.nullcontext(),
    ):
        yield


def no_autocast() -> AbstractContextManager[None]:
    """Within it, no autocast but those entered within it."""
    guard: AbstractContextManager[None] = torch._C._DisableAutocast()
    return guard


@Shared
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


@Shared
@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # All three together: torch refuses to read its older single flag where they differ.
    cudnn: Any = torch.backends.cudnn
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


class TwiceDifferentiable(TorchFunctionMode):
    """Within it, functions whose second derivative torch has wrong are computed by others.

    The double backward pass of weight normalisation (torch 2.13 and 2.15, CPU, weights normalised
    along their first or last dimension) returns products that are wrong by their own size; the
    hard sigmoid has none.

    >>> with TwiceDifferentiable():
    ...     torch._weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]), 0)
    tensor([[6., 8.]])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        if func is functional.hardsigmoid:
            return hardsigmoid(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, norms over all dimensions but one, or over all for dim = -1."""
    others = [d for d in range(v.ndim) if d != dim]
    norms = (v * v).sum(others, keepdim=dim != -1).sqrt()
    return v * (g / norms)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`, piecewise linear, with a second derivative (of 0)."""
    found = functional.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found
