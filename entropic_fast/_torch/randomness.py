"""Which operation of a model or loss draws random numbers, and advice about it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .._utils import checks

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
# Operations named in a message.
_MOST = 3


def not_repeatable(what: str, compute: Callable[[], object]) -> ValueError:
    """The error for a model or loss (`what`) whose values differ for the same inputs.

    `compute` is run once more, to see what draws random numbers.
    """
    draws = sources(compute)
    if not draws:
        got = "different ones in evaluation mode, though no operation of torch draws numbers"
        do = (
            "look for NumPy's or Python's random numbers, and for state that forward changes (a "
            "counter, a cache, a buffer)"
        )
    else:
        got = "noise in evaluation mode from " + ", ".join(
            f"{name} ({place})" for name, place in draws[:_MOST]
        )
        do = "; ".join(dict.fromkeys(_advice(name) for name, _ in draws[:_MOST]))
    return checks.invalid(what, "the same outputs for the same inputs", got, do)


def sources(compute: Callable[[], object]) -> list[tuple[str, str]]:
    """Functions of torch called by `compute` that draw random numbers, with the calling lines."""
    functions = _Functions()
    draws = _Draws(functions)
    with contextlib.suppress(Exception), torch.no_grad(), functions, draws:
        compute()
    return list(dict.fromkeys(draws.found))


class _Functions(TorchFunctionMode):
    """Holds the name of the outermost torch function being called."""

    name = ""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, self.name = self.name, getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = before


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that are tagged as drawing from a generator."""

    def __init__(self, functions: _Functions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions = functions
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            name = self.functions.name or func.overloadpacket.__name__
            self.found.append((name, _caller()))
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line outside torch and this package, as "file:line, in function"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _advice(name: str) -> str:
    if "dropout" in name:
        return f"use nn.Dropout, or F.{name}(..., training=self.training)"
    if name == "scaled_dot_product_attention":
        return "give it dropout_p=p if self.training else 0.0"
    if "norm" in name or "randn" in name:  # normal_, log_normal_, randn_like
        return (
            "noise such as a VAE's sample is not part of a loss over fixed data: return the mean "
            "unless self.training, or draw it once for each example and pass it with the inputs"
        )
    return f"call {name} only if self.training, or draw its numbers once and pass them as inputs"
