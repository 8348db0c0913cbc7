"""Results as lines of hexadecimal floats, and what differs between two lists of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

import entropic_fast as ef
from entropic_fast.dynamics import Interval

SHOWN = 6  # entries of a long tensor
ATTRIBUTES: dict[type, str] = {
    ef.Estimate: "value std_error quadrature",
    ef.Eigenpairs: "values residuals matvecs vectors",
    ef.Diagonal: "value std_error",
    ef.Density: "grid density std_error nodes weights",
    ef.LogDeterminant: "value std_error quadrature bound",
    ef.Trajectory: "position distance loss full_loss",
    Interval: "value low high",
}


def line(name: str, result: object) -> str:
    """`name<TAB>numbers`.

    >>> line("pair", (1, -0.5))
    'pair\\t0x1.0000000000000p+0 -0x1.0000000000000p-1'
    """
    return f"{name}\t{' '.join(number.hex() for number in numbers(result))}"


def numbers(result: object) -> list[float]:
    """The numbers of a result, in a fixed order."""
    if result is None:
        return []
    if isinstance(result, bool | int | float | np.number):
        return [float(result)]
    if isinstance(result, Tensor):
        return entries(result.detach().double().flatten().tolist())
    if isinstance(result, np.ndarray):
        return entries(result.astype(float).ravel().tolist()) if result.dtype.kind in "biuf" else []
    if isinstance(result, Mapping):  # a table too
        result = tuple(result[key] for key in result)
    for kind, names in ATTRIBUTES.items():
        if isinstance(result, kind):
            result = tuple(getattr(result, name) for name in names.split())
    if not isinstance(result, tuple | list):
        raise TypeError(f"no numbers of {type(result).__name__}")
    return [number for part in result for number in numbers(part)]


def entries(values: list[float]) -> list[float]:
    if len(values) <= SHOWN + 2:
        return values
    finite = [value for value in values if math.isfinite(value)]
    return [*values[:: -(-len(values) // SHOWN)], math.fsum(finite)]


def differences(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """A message for each name whose numbers differ, or that only one list has.

    >>> list(differences([line("a", 1), line("b", 2)], [line("b", 2), line("a", 1.5)]))
    ['a: 1 of 1 numbers differ, by 3.3e-01 at most; the first was 1.0, is 1.5']
    >>> list(differences([line("a", 1)], [line("b", 1)]))
    ['a: 1 numbers before, none after', 'b: none before, 1 numbers after']
    """
    old, new = (dict(text.split("\t") for text in texts) for texts in (before, after))
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield f"{name}: {_difference(*(_parsed(texts.get(name, '')) for texts in (old, new)))}"


def _parsed(text: str) -> list[float]:
    return [float.fromhex(number) for number in text.split()]


def _difference(old: list[float], new: list[float]) -> str:
    if len(old) != len(new):
        said = [f"{len(values)} numbers" if values else "none" for values in (old, new)]
        return f"{said[0]} before, {said[1]} after"
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.hex() != b.hex()]
    largest = max(abs(b - a) / (max(abs(a), abs(b)) or 1.0) for a, b in pairs)
    return (
        f"{len(pairs)} of {len(old)} numbers differ, by {largest:.1e} at most; the first was "
        f"{pairs[0][0]!r}, is {pairs[0][1]!r}"
    )
