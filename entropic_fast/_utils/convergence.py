"""One warning per call for results that missed a tolerance, one error for divergence."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parents[1])
_held: ContextVar[list[str] | None] = ContextVar("held", default=None)


class DivergenceError(ValueError):
    """A loss or parameters became NaN or infinite, or every replica left its path.

    Attributes:
        partial: the result so far (of `relax`, a `Trajectory`); None if there is none.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class NotConvergedWarning(UserWarning):
    """A result that missed its tolerance; the message has the numbers, and what to raise.

    The result says the same (`converged`). To make it an error:

    >>> import warnings, torch, entropic_fast as ef
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", ef.NotConvergedWarning)
    ...     ef.top_eigenvalues(torch.diag(torch.arange(200.0)), max_matvecs=3)
    Traceback (most recent call last):
    ...
    entropic_fast._utils.convergence.NotConvergedWarning: top_eigenvalues: ...
    """


def warn_not_converged(message: str) -> None:
    """Warn at the line of the user's program that called, or leave the message to `held`."""
    held = _held.get()
    if held is not None:
        held.append(message)
        return
    warnings.warn(message, NotConvergedWarning, stacklevel=stacklevel())


@contextlib.contextmanager
def held() -> Iterator[list[str]]:
    """Within it, messages are collected instead of shown, for functions that then warn once."""
    messages: list[str] = []
    token = _held.set(messages)
    try:
        yield messages
    finally:
        _held.reset(token)


def warn_once(messages: list[str], what: str) -> None:
    """Warn of several messages as one: their number, and the first."""
    if messages:
        count = f" ({len(messages)} times; the first:)" if len(messages) > 1 else ""
        warn_not_converged(f"{what}{count} {messages[0]}")


def warn_of_overflow(what: str, lost: int, points: int, first: str, and_more: str = "") -> None:
    """Warn of points at which the loss is not finite and results are `inf` or NaN."""
    warnings.warn(
        f"{what}: the loss{and_more} is not finite at {lost} of {points} points, inf or NaN in the "
        f"table; the first is {first}",
        RuntimeWarning,
        stacklevel=stacklevel(),
    )


def stacklevel() -> int:
    """Frames from the function that warns to the first outside of the package."""
    level, frame = 1, sys._getframe(1)
    inside = (_HERE, contextlib.__file__)  # decorators are frames of contextlib
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
