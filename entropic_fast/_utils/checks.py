"""Argument checks with one form of message: what was expected, what came, what to do."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType

import numpy as np
import torch
from torch import Tensor, nn

from .devices import is_gpu

HALF = (torch.float16, torch.bfloat16)
# Limits of an error message: characters of the value received, characters of a string in it, and
# items of a sequence.
LONGEST, TEXT, ITEMS = 240, 98, 4
PLAIN = (
    *(int, float, complex, bool, str, bytes, NoneType, slice, np.generic),
    *(torch.dtype, torch.device, PurePath),
)


def invalid(argument: str, expected: str, got: str, do: str = "") -> ValueError:
    """The error for a bad argument, in the form every public function uses.

    >>> raise invalid("lr", "a positive number", "-1")
    Traceback (most recent call last):
    ...
    ValueError: lr: expected a positive number, got -1
    """
    message = f"{argument}: expected {expected}, got {_cut(got, 2 * LONGEST)}"
    return ValueError(f"{message}; {do}" if do else message)


def device_of(value: object) -> torch.device:
    if isinstance(value, str | int | torch.device) and len(str(value)) <= TEXT:
        try:
            return torch.device(value)
        except RuntimeError:  # a name that torch does not know
            pass
    raise invalid("device", 'a device, as torch.device("cuda:0") or its name', shown(value))


def boolean(argument: str, value: bool) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise invalid(argument, "True or False", shown(value))
    return bool(value)


def functions(**given: object) -> None:
    """Reject arguments other than None that cannot be called."""
    for argument, value in given.items():
        if value is not None and not callable(value):
            raise invalid(argument, "a function", shown(value))


def instance(argument: str, value: object, kind: type, do: str = "") -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise invalid(argument, f"{article} {kind.__name__}", shown(value), do)


def share(argument: str, value: float) -> float:
    """`value` if it is a number in [0, 1)."""
    if not (_is_finite(value) and 0 <= value < 1):
        raise invalid(argument, "a number in [0, 1)", shown(value))
    return value


def numbers(argument: str, values: Iterable[float]) -> list[float]:
    """Numbers of a sequence, array or tensor, as floats."""
    try:
        if isinstance(values, str | Mapping):
            raise TypeError
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise invalid(argument, "numbers, in a sequence or tensor", shown(values)) from None


def file_name(argument: str, value: object) -> str:
    """A file's name as text."""
    if not isinstance(value, str | os.PathLike) or len(os.fspath(value)) > 4096:
        raise invalid(argument, "a file's name", shown(value))
    return str(os.fspath(value))


def positive(argument: str, value: float) -> float:
    """`value` if it is a finite number above zero."""
    if not (_is_finite(value) and value > 0):
        raise invalid(argument, "a finite number above 0", shown(value))
    return value


def _is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # of an integer
        return False


def at_least(argument: str, value: float, minimum: float) -> float:
    """`value` if it is a finite number not below `minimum`."""
    if not (_is_finite(value) and value >= minimum):
        raise invalid(argument, f"a finite number of at least {minimum}", shown(value))
    return value


def integer(argument: str, value: int, minimum: int = 0) -> int:
    """`value` if it is an integer not below `minimum`."""
    try:
        number = operator.index(value)  # NumPy's integers too
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or number < minimum:
        raise invalid(argument, f"an integer of at least {minimum}", shown(value))
    return number


def one_of(argument: str, value: str, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise invalid(argument, "one of " + ", ".join(map(repr, allowed)), shown(value))
    return value


def vector(argument: str, value: Tensor, size: int) -> Tensor:
    """`value` if it is a finite floating-point tensor of shape [size]."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (size,):
        raise invalid(argument, f"a tensor of shape [{size}]", describe(value))
    return finite(argument, value)


def single_or_double(argument: str, dtype: torch.dtype, what: str) -> None:
    """Reject half precision for a quantity (`what`) smaller than its rounding errors."""
    if dtype in HALF:
        raise invalid(
            argument,
            f"float32 or float64 for {what}",
            str(dtype).removeprefix("torch."),
            "convert the model with model.float()",
        )


def finite(argument: str, value: Tensor) -> Tensor:
    """`value` if it is a floating-point tensor without NaN or infinity."""
    if not value.is_floating_point():
        raise invalid(argument, "a floating-point tensor", describe(value))
    if not all_finite(value):
        bad = ~torch.isfinite(value)
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise invalid(
            argument,
            "finite values only",
            f"{int(bad.sum())} NaN or infinite of {value.numel()}, the first at index {first}",
        )
    return value


def all_finite(*values: Tensor) -> bool:
    """Whether no tensor has NaN or infinity; on a GPU one launch each, and one synchronization."""
    if not values:
        return True
    # A finite sum has finite terms, and costs a fifth of checking each.
    if is_gpu(values[0].device):
        sums = [value.detach().sum(dtype=torch.float64) for value in values]
        finite = math.isfinite(float(sum(sums[1:], sums[0])))
    else:
        finite = all(math.isfinite(float(value.detach().sum())) for value in values)
    # Or the sum overflowed.
    return finite or all(bool(torch.isfinite(value).all()) for value in values)


def describe(value: object, depth: int = 2) -> str:
    """A tensor's shape and dtype, or a value's type, for an error message: one short line.

    >>> describe({"x": torch.ones(2, 3)})
    "dict {'x': shape [2, 3] of float32}"
    >>> describe(list(range(10**6)))
    'list {int 0, int 1, int 2, int 3, ...} of length 1000000'
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of shape {list(value.shape)} of {value.dtype}"
    if isinstance(value, nn.Module):
        return f"{kind}, an nn.Module"
    if isinstance(value, Mapping | list | tuple):
        count = len(value)
        if depth == 0:
            return f"{kind} of length {count}"
        if isinstance(value, Mapping):
            pairs = islice(value.items(), ITEMS)
            items = [f"{shown(key, depth - 1)}: {describe(v, depth - 1)}" for key, v in pairs]
        else:
            items = [describe(v, depth - 1) for v in value[:ITEMS]]
        more = f", ...}} of length {count}" if count > ITEMS else "}"
        return _cut(f"{kind} {{{', '.join(items)}", LONGEST - len(more)) + more
    if isinstance(value, type):
        return f"the class {kind if value is type else value.__name__}"
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType):
        return f"the function {value.__name__}"
    return _cut(
        f"{kind} {shown(value)}" if isinstance(value, PLAIN) else f"an object of type {kind}"
    )


def shown(value: object, depth: int = 2) -> str:
    """A value's literal if that is short, or else as `describe` says.

    >>> shown(0.5), shown("LA"), shown((1, None)), len(shown("x" * 1000))
    ('0.5', "'LA'", '(1, None)', 103)
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= TEXT else repr(value[:TEXT]) + "..."
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, PLAIN):
        return _cut(repr(value))
    if isinstance(value, list | tuple) and depth and len(value) <= 2 * ITEMS:
        text = ", ".join(shown(v, depth - 1) for v in value)
        if len(text) <= TEXT:
            comma = "," if len(value) == 1 else ""
            return f"[{text}]" if isinstance(value, list) else f"({text}{comma})"
    return describe(value, depth)


def _cut(text: str, longest: int = 0) -> str:
    r"""A text on one line, cut where it is too long; the lines of a list ("\n  ") stay."""
    longest = longest or LONGEST
    first, *items = text.split("\n  ")
    if items:
        return "\n  ".join([_cut(first, longest), *(_cut(item) for item in items)]) + "\n"
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
