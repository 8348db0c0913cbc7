"""Langevin integrators in plain PyTorch, for any force, on any device.

`drift`, `decay` and `noise` are those of `Coefficients`; z(n) are the standard normal numbers of
step n. One step of each scheme is

    euler-maruyama       x += drift F(x) + noise z(n)
    leimkuhler-matthews  x += drift F(x) + noise (z(n) + z(n + 1)) / 2
    baoab                v += drift F(x); x += drift v; v = decay v + noise z(n);
                         x += drift v; v += drift F(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entropic_fast.ops.langevin.checks import OVERDAMPED, BoxMuller, LangevinSteps
from entropic_fast.ops.langevin.checks import SCHEMES as SCHEMES
from entropic_fast.ops.langevin.checks import UNDERDAMPED as UNDERDAMPED
from entropic_fast.ops.langevin.forces import Force, force_of
from entropic_fast.ops.random_bits import streams as random

# Step number -> standard normal numbers of every coordinate.  # [N, D]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Coefficients:
    """A scheme's numbers; see the module's docstring."""

    drift: float
    decay: float
    noise: float

    @classmethod
    def of(cls, scheme: str, temperature: float, dt: float, friction: float) -> Coefficients:
        """For dx = v dt, dv = F dt - friction v dt + sqrt(2 T friction) dW, or its limit."""
        if scheme in OVERDAMPED:
            return cls(dt / friction, 0.0, math.sqrt(2 * temperature * dt / friction))
        return cls(
            dt / 2,
            math.exp(-friction * dt),
            math.sqrt(-temperature * math.expm1(-2 * friction * dt)),
        )


def integrate(
    x: Tensor,  # [N, D], updated in place
    v: Tensor,  # [N, D], updated in place; [0] for an overdamped scheme
    force: Force,
    scheme: str,
    coefficients: Coefficients,
    steps: int,
    first_step: int,
    noise: Noise,
) -> None:
    """Compute `steps` steps, the first of them number `first_step`."""
    drift, decay, scale = coefficients.drift, coefficients.decay, coefficients.noise
    span = range(first_step, first_step + steps)
    if scheme == "euler-maruyama":
        for n in span:
            x.add_(force(x), alpha=drift)
            if scale > 0:
                x.add_(noise(n), alpha=scale)
    elif scheme == "leimkuhler-matthews":
        last = noise(first_step) if scale > 0 else None
        for n in span:
            x.add_(force(x), alpha=drift)
            if last is not None:
                following = noise(n + 1)
                x.add_(last.add_(following), alpha=0.5 * scale)
                last = following
    elif scheme == "baoab":
        f = force(x)
        for n in span:
            v.add_(f, alpha=drift)
            x.add_(v, alpha=drift)
            v.mul_(decay)
            if scale > 0:
                v.add_(noise(n), alpha=scale)
            x.add_(v, alpha=drift)
            f = force(x)
            v.add_(f, alpha=drift)
    else:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")


def noise_like(
    x: Tensor,  # [N, D]
    seed: int,
    first_particle: int,
) -> Noise:
    """The kernels' numbers: coordinate d of particle i at step n is number i D + d of stream n."""
    shape = tuple(x.shape)
    start = first_particle * x.shape[1]

    def draw(step: int) -> Tensor:
        return random.normal(shape, seed, step, start=start, dtype=x.dtype, device=x.device)

    return draw


# ---- the family's functions ----------------------------------------------------------------------


def langevin_steps(a: LangevinSteps) -> None:
    force = force_of(a.potential, a.parameters)
    draw = noise_like(a.x, a.seed, a.first_particle)
    coefficients = Coefficients(a.drift, a.decay, a.noise)
    if a.x.shape[0] > 0:
        integrate(a.x, a.v, force, a.scheme, coefficients, a.steps, a.first_step, draw)


def box_muller(a: BoxMuller) -> Tensor:  # [n, 2]
    u = (a.words.to(torch.float64) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0]))
    angle = 2.0 * math.pi * u[:, 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).to(a.dtype)
