"""Two ways to the same derivatives: when they agree, and how to do without the faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# Relative difference of the two ways, in the norm of a parameter's gradient, above which one of
# them is wrong; and differences that are small against the whole gradient, as roundings are.
AGREEMENT = {
    torch.float64: (1e-6, 1e-11),
    torch.float32: (1e-2, 1e-5),
    torch.bfloat16: (0.2, 0.05),
    torch.float16: (0.1, 0.02),
}


class DisagreementError(RuntimeError):
    """The fast way and torch's own give different derivatives; the message says of what."""


_rules_off: ContextVar[bool] = ContextVar("rules_off", default=False)


@contextmanager
def without_rules() -> Iterator[None]:
    """Within it, derivatives are those of torch alone: slower, without check.

    The way on after a `DisagreementError`, and to see which of the two ways is wrong. Operators
    built within it keep to this way.

    >>> from entropic_fast import HessianOperator, Objective
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (torch.ones(2, 1),) * 2)
    >>> with without_rules():
    ...     HessianOperator(obj).way
    'autograd, as rules are turned off'
    """
    token = _rules_off.set(True)
    try:
        yield
    finally:
        _rules_off.reset(token)


def rules_are_off() -> bool:
    """Whether we are within `without_rules`."""
    return _rules_off.get()
