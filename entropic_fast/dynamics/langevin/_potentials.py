"""Model potentials of figure 1: curvature that varies along a curve of equal minima.

With H_perp the Hessian across the slow direction, integrating out the fast directions at
temperature T leaves V_eff = (T / 2) ln det H_perp. The slow coordinate's density is exp(-V_eff /
T), up to normalization and corrections of order T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._utils import checks
from ...ops.langevin import forces as langevin_forces


class RingPotential:
    """V(r, theta) = 1/2 g(theta) (r - 1)^2 in the plane, g = stiffness (1 + contrast cos(m theta)).

    Figure 1A: minima on the circle r = 1, with curvature g across it that depends on the angle.
    Positions are (x, y) = (r cos theta, r sin theta).

    Args:
        stiffness: mean of g, above 0.
        contrast: in [0, 1); g is largest at theta = 0, smallest at pi / m.
        modes: m, the number of stiff sectors.

    Raises:
        ValueError: a stiffness that is not above 0, or a contrast outside [0, 1).

    >>> ring = RingPotential(stiffness=10.0, contrast=0.5)
    >>> ring(torch.tensor([[1.5, 0.0], [0.0, 1.0]])).tolist()
    [1.875, 0.0]
    """

    dim = 2

    def __init__(self, stiffness: float = 10.0, contrast: float = 0.9, modes: int = 1) -> None:
        self.mean_stiffness = float(checks.positive("stiffness", stiffness))
        checks.share("contrast", contrast)
        self.contrast, self.modes = float(contrast), checks.integer("modes", modes, 1)

    def stiffness(self, angle: Tensor) -> Tensor:
        """g at angles of any shape."""
        return self.mean_stiffness * (1 + self.contrast * torch.cos(self.modes * angle))

    def __call__(self, x: Tensor) -> Tensor:  # [N, 2] -> [N]
        r = torch.linalg.vector_norm(x, dim=1)
        energy: Tensor = 0.5 * self.stiffness(torch.atan2(x[:, 1], x[:, 0])) * (r - 1).square()
        return energy

    def force(self, x: Tensor) -> Tensor:
        """-grad V in closed form; 0 at the origin, where it has no limit.  # [N, 2] -> [N, 2]"""
        return langevin_forces.ring(x, self.mean_stiffness, self.contrast, self.modes)

    def on_ring(self, angle: Tensor, radius: float | Tensor = 1.0) -> Tensor:
        """Points of given angles [N], on the ring unless a radius is given.  # [N, 2]"""
        return torch.stack((torch.cos(angle), torch.sin(angle)), 1) * torch.as_tensor(
            radius, dtype=angle.dtype, device=angle.device
        ).reshape(-1, 1)

    def effective_potential(self, temperature: float, angle: Tensor) -> Tensor:
        """V_eff = (T/2) ln g(theta): one fast direction, the radius."""
        return 0.5 * temperature * torch.log(self.stiffness(angle))

    def analytic_density(self, temperature: float, angle: Tensor) -> Tensor:
        """Stationary density of the angle under exp(-V / T) r dr dtheta, exact for T > 0.

        With v = T / g the integral over r is sqrt(2 pi v) Phi(1 / sqrt(v)) + v exp(-1 / 2v), to
        leading order g^(-1/2) = exp(-V_eff / T). At T = 0 a uniform density stays uniform.

        Args:
            temperature: T, at least 0.
            angle: radians, any shape.

        Returns:
            density in radians^-1, which integrates to 1 over a turn.
        """
        checks.at_least("temperature", temperature, 0.0)
        if temperature == 0:
            return torch.full_like(angle, 1 / (2 * math.pi))
        # The trapezium rule on a periodic smooth function converges faster than any power.
        grid = torch.arange(4096, dtype=torch.float64) * (2 * math.pi / 4096)
        norm = self._radial_integral(temperature, grid).mean() * 2 * math.pi
        return (self._radial_integral(temperature, angle.double()) / norm).to(angle.dtype)

    def _radial_integral(self, temperature: float, angle: Tensor) -> Tensor:
        v = temperature / self.stiffness(angle)
        phi: Tensor = torch.special.ndtr(v.rsqrt())
        integral: Tensor = torch.sqrt(2 * math.pi * v) * phi + v * torch.exp(-0.5 / v)
        return integral


class RidgePotential:
    """V(x, y) = 1/2 g(y) |x|^2: a channel whose stiffness falls from one end to the other.

    Figure 1B: the floor x = 0 is flat, so only the noise in x moves y, toward the broad side. g(y)
    = stiff (broad / stiff)^(y / length) makes the entropic force the same everywhere. Soft walls
    1/2 wall (distance beyond)^2 keep y in [0, length]. Positions are (x_1 ... x_n, y).

    Args:
        stiff, broad: g at y = 0 and at y = length, above 0.
        length: of the channel.
        fast: n, the number of fast directions x.
        wall: stiffness of the walls; 0 for none (then no stationary density exists).

    Raises:
        ValueError: a stiffness or length that is not above 0.

    >>> ridge = RidgePotential(stiff=100.0, broad=1.0)
    >>> ridge(torch.tensor([[0.5, 0.0], [0.0, 0.7]])).tolist()
    [12.5, 0.0]
    """

    def __init__(
        self,
        stiff: float = 100.0,
        broad: float = 10.0,
        length: float = 1.0,
        fast: int = 1,
        wall: float = 100.0,
    ) -> None:
        self.stiff = float(checks.positive("stiff", stiff))
        self.broad = float(checks.positive("broad", broad))
        self.length = float(checks.positive("length", length))
        self.fast = checks.integer("fast", fast, 1)
        self.wall = float(checks.at_least("wall", wall, 0.0))
        self.dim = self.fast + 1
        self.slope = math.log(self.broad / self.stiff) / self.length  # d ln g / dy

    def stiffness(self, y: Tensor) -> Tensor:
        """g at y of any shape."""
        return self.stiff * torch.exp(self.slope * y)

    def __call__(self, x: Tensor) -> Tensor:  # [N, n + 1] -> [N]
        y = x[:, -1]
        return 0.5 * self.stiffness(y) * x[:, :-1].square().sum(1) + self._wall(y)

    def force(self, x: Tensor) -> Tensor:
        """-grad V in closed form.  # [N, n + 1] -> [N, n + 1]"""
        return langevin_forces.ridge(x, self.stiff, self.slope, self.length, self.wall)

    def effective_potential(self, temperature: float, y: Tensor) -> Tensor:
        """V_eff = (n T / 2) ln g(y), and the walls."""
        return 0.5 * self.fast * temperature * torch.log(self.stiffness(y)) + self._wall(y)

    def effective_force(self, temperature: float) -> float:
        """-dV_eff/dy between the walls: -(n T / 2) d ln g / dy, the same everywhere."""
        return -0.5 * self.fast * temperature * self.slope

    def analytic_density(self, temperature: float, y: Tensor) -> Tensor:
        """Stationary density of y, exact: exp(-V_eff / T), normalized in closed form.

        Args:
            temperature: T, above 0.
            y: any shape.

        Raises:
            ValueError: no walls, or T = 0, which have no stationary density.
        """
        checks.positive("temperature", temperature)
        checks.positive("wall", self.wall)
        # exp(-b y) in the channel; beyond, a Gaussian of variance v about each wall times it.
        b, v = 0.5 * self.fast * self.slope, temperature / self.wall
        inside = self.length if b == 0 else -math.expm1(-b * self.length) / b
        tails = self._tail(-b, v) + math.exp(-b * self.length) * self._tail(b, v)
        norm = inside + tails
        beyond = self._beyond(y)
        return torch.exp(-b * y - 0.5 * beyond * beyond / v) / norm

    @staticmethod
    def _tail(b: float, v: float) -> float:
        """int_0^inf exp(-b u - u^2 / 2v) du."""
        root = math.sqrt(v / 2)
        scaled = torch.special.erfcx(torch.tensor(b * root, dtype=torch.float64))
        return math.sqrt(math.pi) * root * float(scaled)

    def _beyond(self, y: Tensor) -> Tensor:
        """Signed distance of y outside [0, length]."""
        return y - y.clamp(0.0, self.length)

    def _wall(self, y: Tensor) -> Tensor:
        return 0.5 * self.wall * self._beyond(y).square()


class ChannelPotential:
    """V(x, y) = 1/2 g(y) |x|^2, g = stiffness exp(contrast cos(2 pi y / length)): a closed channel.

    Its floor x = 0 is flat and has no ends, so only the curvature distinguishes values of y, and
    the density along it does not depend on temperature. y has period `length` and is not wrapped.
    Positions are (x_1 ... x_n, y).

    Args:
        stiffness: geometric mean of g, above 0.
        contrast: at least 0; g is largest at y = 0 and smallest at y = length / 2.
        length: of a period.
        fast: n, the number of fast directions x.

    Raises:
        ValueError: a stiffness or length that is not above 0, or a negative contrast.

    >>> channel = ChannelPotential(stiffness=10.0)
    >>> channel(torch.tensor([[1.0, 0.25], [0.0, 0.7]])).round(decimals=4).tolist()
    [5.0, 0.0]
    """

    def __init__(
        self, stiffness: float = 50.0, contrast: float = 1.0, length: float = 1.0, fast: int = 1
    ) -> None:
        self.mean_stiffness = float(checks.positive("stiffness", stiffness))
        self.contrast = float(checks.at_least("contrast", contrast, 0.0))
        self.length = float(checks.positive("length", length))
        self.fast = checks.integer("fast", fast, 1)
        self.dim = self.fast + 1

    def stiffness(self, y: Tensor) -> Tensor:
        """g at y of any shape."""
        wave = torch.cos(2 * math.pi / self.length * y)
        return self.mean_stiffness * torch.exp(self.contrast * wave)

    def __call__(self, x: Tensor) -> Tensor:  # [N, n + 1] -> [N]
        return 0.5 * self.stiffness(x[:, -1]) * x[:, :-1].square().sum(1)

    def force(self, x: Tensor) -> Tensor:
        """-grad V in closed form.  # [N, n + 1] -> [N, n + 1]"""
        return langevin_forces.channel(x, self.mean_stiffness, self.contrast, self.length)

    def effective_potential(self, temperature: float, y: Tensor) -> Tensor:
        """V_eff = (n T / 2) ln g(y)."""
        return 0.5 * self.fast * temperature * torch.log(self.stiffness(y))

    def effective_force(self, temperature: float, y: Tensor) -> Tensor:
        """-dV_eff/dy = n T (pi / length) contrast sin(2 pi y / length)."""
        wave = torch.sin(2 * math.pi / self.length * y)
        return self.fast * temperature * math.pi / self.length * self.contrast * wave

    def analytic_density(self, temperature: float, y: Tensor) -> Tensor:
        """Stationary density of y modulo `length`, exact for every T > 0.

        g^(-n/2) is a von Mises density: exp(-a cos(2 pi y / length)) / (length I_0(a)), a = n
        contrast / 2.

        Raises:
            ValueError: T = 0, which has no stationary density.
        """
        checks.positive("temperature", temperature)
        a = 0.5 * self.fast * self.contrast
        # I_0(a) e^-a, which does not overflow.
        scaled = torch.special.i0e(torch.tensor(a, dtype=torch.float64))
        wave = torch.cos(2 * math.pi / self.length * y)
        return torch.exp(-a * (wave + 1)) / (self.length * float(scaled))


def kernel_form(potential: object) -> tuple[str, tuple[float, ...]] | None:
    """Name and parameters in `ops.langevin` of a built-in potential; None for all others."""
    if "force" in getattr(potential, "__dict__", {}):
        return None
    if type(potential) is RingPotential:
        return "ring", (potential.mean_stiffness, potential.contrast, float(potential.modes))
    if type(potential) is RidgePotential:
        return "ridge", (potential.stiff, potential.slope, potential.length, potential.wall)
    if type(potential) is ChannelPotential:
        return "channel", (potential.mean_stiffness, potential.contrast, potential.length)
    return None
