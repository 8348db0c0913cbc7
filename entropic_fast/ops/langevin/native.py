"""Family `langevin` on the compiled module: C++ for CPU tensors.

Called by `entropic_fast.ops.langevin` with checked tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops.langevin.forces import FORCES
from entropic_fast.ops.langevin.reference import SCHEMES


def advance(
    x: Tensor,  # [N, D], updated in place
    v: Tensor,  # [N, D], updated in place; [0] for an overdamped scheme
    potential: str,
    parameters: Sequence[float],
    scheme: str,
    drift: float,
    decay: float,
    noise: float,
    steps: int,
    first_step: int,
    first_particle: int,
    seed: int,
) -> None:
    entry = getattr(native.module(), f"langevin_advance_cpu_{_suffix(x.dtype)}")
    entry(
        x.data_ptr(), v.data_ptr(), *x.shape,
        tuple(FORCES).index(potential), tuple(parameters), SCHEMES.index(scheme),
        (drift, decay, noise), (steps, first_step, first_particle, seed), native.threads(),
    )  # fmt: skip


def box_muller(
    words: Tensor,  # [n, 2] int64
    dtype: torch.dtype,
) -> Tensor:  # [n, 2]
    normal = torch.empty(words.shape, dtype=dtype)
    entry = getattr(native.module(), f"langevin_box_muller_cpu_{_suffix(dtype)}")
    entry(words.data_ptr(), normal.data_ptr(), words.shape[0])
    return normal


def _suffix(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "float64"
