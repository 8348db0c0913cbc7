"""Arguments of family `langevin`, and what is required of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import describe, integer, invalid, one_of, shown
from entropic_fast.ops._checks import DTYPES, check_contiguous, check_dtype

OVERDAMPED = ("euler-maruyama", "leimkuhler-matthews")
UNDERDAMPED = ("baoab",)
SCHEMES = OVERDAMPED + UNDERDAMPED

# Names of each potential's parameters.
PARAMETERS = {
    "ring": ("stiffness", "contrast", "modes"),
    "ridge": ("stiff", "slope", "length", "wall"),
    "channel": ("stiffness", "contrast", "length"),
}


class LangevinSteps(NamedTuple):
    x: Tensor  # [N, D] float32 or float64, updated
    v: Tensor  # [N, D], updated; [0] for an overdamped scheme
    potential: str
    parameters: Sequence[float]  # see PARAMETERS
    scheme: str
    drift: float  # as the next two, of `Coefficients`
    decay: float
    noise: float
    steps: int
    first_step: int
    first_particle: int
    seed: int
    backend: str  # "" for the one in force


class BoxMuller(NamedTuple):
    words: Tensor  # [n, 2] int64 in [0, 2^32)
    dtype: torch.dtype
    backend: str  # "" for the one in force


def new_normal(a: BoxMuller) -> Tensor:  # [n, 2]
    return torch.empty(a.words.shape, dtype=a.dtype, device=a.words.device)


def check_steps(a: LangevinSteps) -> None:
    one_of("potential", a.potential, PARAMETERS)
    one_of("scheme", a.scheme, SCHEMES)
    names = PARAMETERS[a.potential]
    if len(a.parameters) != len(names) or not all(map(math.isfinite, a.parameters)):
        raise invalid("parameters", f"finite {', '.join(names)}", shown(tuple(a.parameters)))
    _check_positions(a)
    for name in ("steps", "first_step", "first_particle", "seed"):
        integer(name, getattr(a, name))


def _check_positions(a: LangevinSteps) -> None:
    x, v, ring = a.x, a.v, a.potential == "ring"
    if x.dim() != 2 or x.shape[1] < 2 or (ring and x.shape[1] != 2):
        wanted = "[N, 2]" if ring else "[N, D] with D >= 2"
        raise invalid("x", f"shape {wanted} for the {a.potential}", f"shape {list(x.shape)}")
    check_dtype("x", x)
    if a.scheme not in UNDERDAMPED:
        if v.numel() > 0:
            raise invalid("v", f"None for {a.scheme}", describe(v))
    elif v.shape != x.shape or v.dtype != x.dtype or v.device != x.device:
        expected = f"{describe(x)} on {x.device}, as x, for {a.scheme}"
        raise invalid("v", expected, f"{describe(v)} on {v.device}")
    check_contiguous(x=x, v=v)


def check_box_muller(a: BoxMuller) -> None:
    if a.words.dim() != 2 or a.words.shape[1] != 2 or a.words.dtype != torch.int64:
        raise invalid("words", "shape [n, 2] of int64", describe(a.words))
    if a.dtype not in DTYPES:
        raise invalid("dtype", "float32 or float64", str(a.dtype))


def check_words(a: BoxMuller) -> None:
    """Checks of the numbers themselves."""
    if a.words.numel() == 0:
        return
    low, high = int(a.words.min()), int(a.words.max())
    if not 0 <= low <= high < 2**32:
        raise invalid("words", "numbers in [0, 2^32)", f"{low} to {high}")
