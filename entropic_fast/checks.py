"""Argument checks with one form of message: what was expected, what came, what to do."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from .devices import is_gpu

HALF = (torch.float16, torch.bfloat16)


def fail(argument: str, expected: str, got: str, do: str = "") -> ValueError:
    """The error for a bad argument, in the form every public function uses.

    >>> raise fail("lr", "a positive number", "-1")
    Traceback (most recent call last):
    ...
    ValueError: lr: expected a positive number, got -1
    """
    message = f"{argument}: expected {expected}, got {got}"
    return ValueError(f"{message}; {do}" if do else message)


def positive(argument: str, value: float) -> float:
    """`value` if it is a finite number above zero."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise fail(argument, "a finite number above 0", repr(value))
    return value


def at_least(argument: str, value: float, minimum: float) -> float:
    """`value` if it is a finite number not below `minimum`."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= minimum):
        raise fail(argument, f"a finite number of at least {minimum}", repr(value))
    return value


def whole(argument: str, value: int, minimum: int = 0) -> int:
    """`value` if it is a whole number not below `minimum`."""
    try:
        number = operator.index(value)  # NumPy's integers too
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or number < minimum:
        raise fail(argument, f"a whole number of at least {minimum}", repr(value))
    return number


def one_of(argument: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`."""
    allowed = tuple(choices)
    if value not in allowed:
        raise fail(argument, "one of " + ", ".join(map(repr, allowed)), repr(value))
    return value


def vector(argument: str, value: Tensor, size: int) -> Tensor:
    """`value` if it is a finite floating-point tensor of shape [size]."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (size,):
        raise fail(argument, f"a tensor of shape [{size}]", describe(value))
    return finite(argument, value)


def full_precision(argument: str, dtype: torch.dtype, what: str) -> None:
    """Refuse half precision for a quantity (`what`) that its rounding would drown.

    >>> full_precision("obj", torch.bfloat16, "the Hessian")
    Traceback (most recent call last):
    ...
    ValueError: obj: expected float32 or float64 for the Hessian, got bfloat16; convert the model
    with model.float()
    """
    if dtype in HALF:
        raise fail(
            argument,
            f"float32 or float64 for {what}",
            str(dtype).removeprefix("torch."),
            "convert the model with model.float()",
        )


def finite(argument: str, value: Tensor) -> Tensor:
    """`value` if it is a floating-point tensor without NaN or infinity."""
    if not value.is_floating_point():
        raise fail(argument, "a floating-point tensor", describe(value))
    if not all_finite(value):
        bad = ~torch.isfinite(value)
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise fail(
            argument,
            "finite values only",
            f"{int(bad.sum())} NaN or infinite of {value.numel()}, the first at index {first}",
        )
    return value


def all_finite(*values: Tensor) -> bool:
    """Whether no tensor has NaN or infinity; on a GPU one launch each, and one synchronization.

    >>> all_finite(torch.ones(2), torch.tensor([float("inf")]))
    False
    """
    if not values:
        return True
    # A finite sum has finite terms; it costs a fifth of looking at each.
    if is_gpu(values[0].device):
        sums = [value.detach().sum(dtype=torch.float64) for value in values]
        finite = math.isfinite(float(sum(sums[1:], sums[0])))
    else:
        finite = all(math.isfinite(float(value.detach().sum())) for value in values)
    # Or the sum overflowed.
    return finite or all(bool(torch.isfinite(value).all()) for value in values)


def describe(value: object) -> str:
    """A tensor's shape and dtype, or a value's type, for an error message.

    >>> describe({"x": torch.ones(2, 3)})
    "dict {'x': shape [2, 3] of float32}"
    """
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}, an nn.Module"
    if isinstance(value, Mapping):
        items = [f"{key!r}: {describe(v)}" for key, v in islice(value.items(), 4)]
    elif isinstance(value, list | tuple):
        items = [describe(v) for v in value[:4]]
    else:
        items = None
    if items is not None:
        more = ", ..." if len(value) > 4 else ""  # type: ignore[arg-type]
        return f"{type(value).__name__} {{{', '.join(items)}{more}}}"
    return f"{type(value).__name__} {value!r}"[:120]
