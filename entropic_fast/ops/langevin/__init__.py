"""Family `langevin`: Langevin dynamics of many particles, many steps in one call.

Potentials are in `forces`, integrators in `reference`. A kernel keeps each particle in registers
from the first step of a call to the last: coordinate d of particle i at step n gets standard normal
number i D + d of stream n of `random_bits.streams.normal`. So the noise depends on seed, particle
and step alone, not on the device, threads, other particles or how a run is cut into calls; results
of one backend are the same bits for all of these.

Work per particle in the plane and step (Leimkuhler-Matthews, ring; a fused multiply-add is two
operations): 40 operations on words, and 105 floating-point operations, among them two square roots
and two divisions; two thirds are for noise. A call reads and writes 32 bytes per particle in
float64 (64 with velocities): above a few steps per call arithmetic is the limit.

Float64 results agree with the reference to rounding; errors of the normal numbers, in units of the
last place, are at most `NORMAL_ULP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from entropic_fast._utils.checks import at_least, one_of, positive
from entropic_fast.ops import backend as backends
from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op, no_results
from entropic_fast.ops.backend import BackendError, backend_for, implementation, register_family
from entropic_fast.ops.langevin import checks
from entropic_fast.ops.langevin.checks import PARAMETERS as PARAMETERS
from entropic_fast.ops.langevin.checks import BoxMuller, LangevinSteps
from entropic_fast.ops.langevin.reference import SCHEMES, Coefficients

FAMILY = "langevin"

# Dimensions the kernels have registers for; the reference takes any.
LARGEST_DIM = {"cpp": 16, "triton": 16}

# Largest error of the C++ and Triton normal numbers, in units of the last place. C++ was seen to
# reach 4.6 in 10^7 and 3.2 in 4 10^6 pairs.
NORMAL_ULP = {torch.float32: 6.0, torch.float64: 4.0}

register_family(FAMILY)


def langevin_steps(
    x: Tensor,  # [N, D] float32 or float64, updated in place
    v: Tensor | None = None,  # [N, D], updated in place; for "baoab" only
    *,
    potential: str,
    parameters: Sequence[float],
    scheme: str,
    temperature: float,
    dt: float,
    steps: int,
    friction: float = 1.0,
    first_step: int = 0,
    first_particle: int = 0,
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """Takes `steps` steps of every particle; not finite where an integration diverges.

    Args:
        x, v: positions, and velocities of unit masses.
        potential, parameters: "ring", "ridge" or "channel", and its numbers (see `PARAMETERS`).
        scheme: "euler-maruyama", "leimkuhler-matthews" or "baoab".
        temperature, dt, friction: as in `entropic_fast.dynamics.simulate_langevin`.
        first_step, first_particle: numbers of the first step and particle.
        seed: of the noise, in [0, 2^63).
        backend: None for the one in force.

    Raises:
        ValueError: arguments that do not fit.
        BackendError: a backend asked for by name that cannot run here.

    Example:
        >>> x = torch.tensor([[2.0, 0.0]])
        >>> langevin_steps(x, potential="ring", parameters=(10.0, 0.0, 1), scheme="euler-maruyama",
        ...                temperature=0.0, dt=0.05, steps=1)
        >>> x
        tensor([[1.5000, 0.0000]])
    """
    reject_autograd(x=x, v=v)
    one_of("scheme", scheme, SCHEMES)
    at_least("temperature", temperature, 0.0)
    positive("dt", dt)
    positive("friction", friction)
    c = Coefficients.of(scheme, temperature, dt, friction)
    _langevin_steps(LangevinSteps(
        x, x.new_empty(0) if v is None else v, potential, [float(p) for p in parameters], scheme,
        c.drift, c.decay, c.noise, steps, first_step, first_particle, seed, backend or "",
    ))  # fmt: skip


def box_muller(
    words: Tensor,  # [n, 2] int64 in [0, 2^32)
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
) -> Tensor:  # [n, 2]
    """The kernels' normal numbers from uniform words, to examine their accuracy.

    sqrt(-2 ln u_0) (cos, sin)(2 pi u_1) with u = (word + 1/2) / 2^32.

    >>> box_muller(torch.tensor([[2**31, 2**30]])).round(decimals=3)
    tensor([[-0.0000, 1.1770]], dtype=torch.float64)
    """
    return _box_muller(BoxMuller(words, dtype, backend or ""))


def backend_of(dim: int, device: torch.device | str, setting: str | None = None) -> str:
    """The backend that runs `dim` dimensions on `device`: a kernel if it has room for them.

    >>> backend_of(1000, "cpu")
    'reference'
    """
    chosen = backend_for(FAMILY, device, setting)
    if dim <= LARGEST_DIM.get(chosen, dim):
        return chosen
    if (setting or backends.setting_for(device)) != "auto":
        raise BackendError(
            f"backend {chosen!r} was asked for but its langevin kernel has at most "
            f"{LARGEST_DIM[chosen]} dimensions, and the potential has {dim}. Use 'reference'."
        )
    return "reference"


# ---- registration with torch ---------------------------------------------------------------------


def _module(a: LangevinSteps) -> ModuleType:
    setting = a.backend or None
    chosen = backend_of(a.x.shape[1], a.x.device, setting)
    usual = chosen == backend_for(FAMILY, a.x.device, setting)
    return implementation(FAMILY, a.x.device, setting if usual else chosen)


_langevin_steps = Op(
    FAMILY, "langevin_steps", LangevinSteps, check=checks.check_steps,
    results=no_results, writes=("x", "v"), module=_module,
)  # fmt: skip
_box_muller = Op(
    FAMILY, "box_muller", BoxMuller, name="langevin_box_muller", check=checks.check_box_muller,
    prepare=checks.check_words, results=checks.new_normal,
    module=lambda a: implementation(FAMILY, a.words.device, a.backend or None),
)  # fmt: skip
