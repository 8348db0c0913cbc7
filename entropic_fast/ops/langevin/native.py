"""Family `langevin` on the compiled module: C++ for CPU tensors."""

from __future__ import annotations

from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.langevin.checks import SCHEMES, BoxMuller, LangevinSteps, new_normal
from entropic_fast.ops.langevin.forces import FORCES

PARAMETERS = 4  # of a potential in csrc/cpu/langevin.h, at most


def langevin_steps(a: LangevinSteps) -> None:
    missing = PARAMETERS - len(a.parameters)
    native.call(
        "langevin_steps", a.x, a.x, a.v, *a.x.shape,
        tuple(FORCES).index(a.potential), *a.parameters, *[0.0] * missing,
        SCHEMES.index(a.scheme), a.drift, a.decay, a.noise,
        a.steps, a.first_step, a.first_particle, a.seed,
    )  # fmt: skip


def box_muller(a: BoxMuller) -> Tensor:
    normal = new_normal(a)
    native.call("box_muller", normal, a.words.contiguous(), normal, a.words.shape[0])
    return normal
