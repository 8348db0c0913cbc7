"""Forces -grad V of the built-in potentials in plain PyTorch: positions [N, D] to forces [N, D].

Positions are (x_1 ... x_n, y). Parameters of each, in the order of the compiled kernels:

- ring: stiffness k, contrast c, modes m. V = 1/2 k (1 + c cos m theta) (r - 1)^2 in the plane.
- ridge: stiff s, slope b, length l, wall w. V = 1/2 s e^(b y) |x|^2 + 1/2 w (y beyond [0, l])^2.
- channel: stiffness k, contrast c, length l. V = 1/2 k e^(c cos(2 pi y / l)) |x|^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Force = Callable[[Tensor], Tensor]


def ring(
    positions: Tensor,  # [N, 2]
    stiffness: float,
    contrast: float,
    modes: float,
) -> Tensor:  # [N, 2]
    x, y = positions[:, 0], positions[:, 1]
    r = torch.sqrt(x * x + y * y)
    inverse = torch.where(r > 0, 1 / r, 0.0)
    cos, sin = x * inverse, y * inverse
    c, s = cos, sin  # of m theta, by the addition theorem: faster than angles
    for _ in range(int(modes) - 1):
        c, s = c * cos - s * sin, s * cos + c * sin
    u = r - 1
    radial = -stiffness * (1 + contrast * c) * u
    # -(1/r) dV/dtheta = (1/r) 1/2 k c m sin(m theta) u^2
    angular = (0.5 * stiffness * contrast * modes) * s * u * u * inverse
    return torch.stack((radial * cos - angular * sin, radial * sin + angular * cos), 1)


def ridge(
    positions: Tensor,  # [N, n + 1]
    stiff: float,
    slope: float,
    length: float,
    wall: float,
) -> Tensor:  # [N, n + 1]
    x, y = positions[:, :-1], positions[:, -1]
    g = stiff * torch.exp(slope * y)
    beyond = y - y.clamp(0.0, length)
    slow = -0.5 * slope * g * (x * x).sum(1) - wall * beyond
    return torch.cat((-g[:, None] * x, slow[:, None]), 1)


def channel(
    positions: Tensor,  # [N, n + 1]
    stiffness: float,
    contrast: float,
    length: float,
) -> Tensor:  # [N, n + 1]
    x, y = positions[:, :-1], positions[:, -1]
    turns = y * (1 / length)
    angle = 2 * math.pi * (turns - torch.round(turns))  # small, so its cosine loses no digits
    g = stiffness * torch.exp(contrast * torch.cos(angle))
    slow = (math.pi * contrast / length) * g * torch.sin(angle) * (x * x).sum(1)
    return torch.cat((-g[:, None] * x, slow[:, None]), 1)


FORCES: dict[str, Callable[..., Tensor]] = {"ring": ring, "ridge": ridge, "channel": channel}


def force_of(potential: str, parameters: Sequence[float]) -> Force:
    """A potential's force with its parameters filled in."""
    return partial(_call, FORCES[potential], tuple(parameters))


def _call(force: Callable[..., Tensor], parameters: tuple[float, ...], positions: Tensor) -> Tensor:
    return force(positions, *parameters)
