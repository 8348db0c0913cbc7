"""Functions that `torch.compile` returned, run as they were written.

Compiled code has no second derivative and is opaque to a graph capture. The settings are the
process's: compiled functions of other threads run eagerly meanwhile, with the same results.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .full_precision import RefCountedContext


def eager() -> AbstractContextManager[None]:
    """Within it nothing is compiled, and compiled functions run as they were written."""
    if torch.compiler.is_compiling() or not _can_compile() or _is_inside_compiled():
        return nullcontext()
    return _eager()


def inlined() -> AbstractContextManager[None]:
    """Within it, torch's tracers record the operations of compiled functions."""
    return _inlined() if _can_compile() else nullcontext()


def _can_compile() -> bool:
    """Whether something may have been compiled: importing torch's compiler takes seconds."""
    return "torch._dynamo.eval_frame" in sys.modules


def _is_inside_compiled() -> bool:
    callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    return callback is not None and callback is not False


@RefCountedContext
@contextlib.contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@RefCountedContext
@contextlib.contextmanager
def _inlined() -> Iterator[None]:
    config: Any = sys.modules["torch._dynamo.config"]
    with config.patch(error_on_nested_fx_trace=False):
        yield
