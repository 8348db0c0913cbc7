"""One comparison and its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        kind: "op" or "network".
        name: the op, or the calculation.
        backend, device, dtype: what computed it.
        against: what it was compared with.
        tolerance: largest relative error that rounding explains.
        error: relative error; infinite if it failed, NaN before it was measured.
        message: the error raised, or "".
        graphs: on a GPU "captured" if CUDA graphs ran, or why none did; else "".
    """

    kind: str
    name: str
    backend: str
    device: str
    dtype: str
    against: str
    tolerance: float
    error: float = math.nan
    message: str = ""
    graphs: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def measured(self, error: float, graphs: str = "") -> Check:
        return replace(self, error=error, graphs=graphs)

    def failed(self, message: str) -> Check:
        return replace(self, error=math.inf, message=message)

    def finding(self) -> str:
        """What is wrong, in one sentence."""
        what = f"{self.name} ({self.dtype}) on backend {self.backend}, device {self.device}"
        if self.message:
            return f"{what}: raised {self.message}"
        return (
            f"{what}: off by {self.error:.2g} relative to {self.against}, "
            f"where rounding explains {self.tolerance:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        values = {**asdict(self), "ok": self.ok}
        if not math.isfinite(self.error):
            values["error"] = str(self.error)
        return values


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; infinite if shapes or non-finite values differ.

    Integers are equal, or the error is infinite.

    >>> import torch
    >>> relative_error(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    inf
    """
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if bool((found.cpu() == expected.cpu()).all()) else math.inf
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    known = expected.isfinite()
    if not torch.equal(found.isfinite(), known):
        return math.inf
    difference = float((found - expected)[known].norm())
    if difference == 0:
        return 0.0
    scale = float(expected[known].norm())
    return difference / scale if scale > 0 else math.inf
