"""One table of tolerances for every kernel test, and the comparison that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative norm |a - b| / |b| of results that differ in the order of rounding only: about 16 and 64
# units of the last place.
ROUNDING = {torch.float32: 2e-6, torch.float64: 2e-14}


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64; 0 for two empty or two zero tensors."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} != {list(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    if difference == 0:
        return 0.0
    scale = expected.double().norm().item()
    return difference / scale if scale > 0 else float("inf")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Fails unless the relative norm is within `tolerance` (by default that of the dtype)."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} != {expected.dtype}"
    limit = ROUNDING[expected.dtype] if tolerance is None else tolerance
    error = relative_norm(actual.cpu(), expected.cpu())
    assert error <= limit, f"relative norm of the difference {error:.3g} > {limit:.3g}"
