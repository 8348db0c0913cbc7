"""The arithmetic of exact quantities: full float32, and attention that can be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def exact_math() -> Iterator[None]:
    """Within it, and as a decorator: no TF32, no fused attention. Restores what was set.

    On a GPU torch convolves float32 numbers in TF32 unless told otherwise, with 10 bits of
    mantissa: curvature would be off by 1e-3. Fused attention has no second derivative, so
    attention is computed by plain matrix products.

    >>> with exact_math():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _full_float32():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield
        return
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
