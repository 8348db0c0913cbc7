"""Potentials, starts and comparisons that the tests of family `langevin` share."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from entropic_fast.ops.langevin import PARAMETERS, langevin_steps
from entropic_fast.ops.langevin.reference import SCHEMES, UNDERDAMPED

DTYPES = (torch.float32, torch.float64)
POTENTIALS: dict[str, tuple[float, ...]] = {
    "ring": (7.0, 0.6, 3),
    "ridge": (30.0, -0.7, 2.0, 50.0),
    "channel": (20.0, 0.8, 1.5),
}
assert POTENTIALS.keys() == PARAMETERS.keys()
assert all(len(POTENTIALS[name]) == len(PARAMETERS[name]) for name in POTENTIALS)

# Rounding differs from backend to backend by few units of the last place a step; the flow, of
# stiffness x dt = 0.3 at most, hardly magnifies it: 16 and 64 units of numbers of about 1.
CLOSE = {torch.float32: 8e-6, torch.float64: 1.5e-14}


def start(
    particles: int, dim: int, scheme: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Positions near the ring and the channel's floor, and velocities if the scheme has them."""
    g = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.6 * torch.rand(particles, dim, generator=g, dtype=torch.float64)
    v = torch.randn(particles, dim, generator=g, dtype=torch.float64)
    x = x.to(device, dtype)
    return x, v.to(device, dtype) if scheme in UNDERDAMPED else None


def advanced(x: Tensor, v: Tensor | None, potential: str, scheme: str, **options: Any) -> Tensor:
    """Positions, and velocities beside them, after steps of copies.  # [N, D] or [N, 2 D]"""
    settings = {"temperature": 0.3, "dt": 0.01, "steps": 6, "seed": 5, **options}
    x, v = x.clone(), None if v is None else v.clone()
    langevin_steps(
        x, v, potential=potential, parameters=POTENTIALS[potential], scheme=scheme, **settings
    )
    return x if v is None else torch.cat((x, v), 1)


def kinds() -> list[tuple[str, str]]:
    """Every potential with every scheme."""
    return list(product(POTENTIALS, SCHEMES))


def assert_same_steps(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = float((actual.cpu().double() - expected.cpu().double()).abs().max())
    limit = CLOSE[expected.dtype] * (1 + float(expected.abs().max()))
    assert error <= limit, f"{error:.3g} > {limit:.3g}"
