"""Langevin dynamics of independent particles, and the model potentials of figure 1.

Start with `_simulate`. Relies on the kernels of `ops.langevin`.
"""

from ._potentials import ChannelPotential, RidgePotential, RingPotential
from ._simulate import LangevinIntegrator, LangevinRecording, LangevinResult, simulate_langevin

__all__ = [
    "simulate_langevin",
    "LangevinIntegrator",
    "LangevinRecording",
    "LangevinResult",
    "RingPotential",
    "RidgePotential",
    "ChannelPotential",
]
