"""Family `langevin`: Langevin dynamics of many particles, many steps in one call.

Built-in potentials (formulas in `entropic_fast.ops.langevin.forces`) and integrators
(`ops.langevin.reference`). A kernel keeps each particle in registers from the first step
of a call to the last, and makes its noise on the spot: coordinate d of particle i at step n gets
standard normal number i D + d of stream n of `random_bits.streams.normal`. So the noise depends on
seed, particle and step alone, not on the device, threads, other particles or how a run is cut into
calls; results of one backend are the same bits for all of these.

Work for a particle in the plane and a step (Leimkuhler-Matthews, ring; a fused multiply-add is two
operations): half a Philox counter, 40 operations on words, 10 of them multiplications; a logarithm
30, a square root and products 4, a sine and cosine 39; force 22 and update 10. That is 105
floating-point operations, two square roots and two divisions among them. A call reads and writes 32
bytes a particle in float64 (64 with velocities), 32 / steps a particle-step: above a few steps a
call arithmetic is the limit, and of it two thirds is noise. In float32 a register holds twice as
many particles.

Float64 results agree with the reference to rounding. Errors of the normal numbers, in units of the
last place of the exact ones: at most `NORMAL_ULP`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropic_fast._utils import checks
from entropic_fast._utils.checks import invalid, shown
from entropic_fast.ops import backend as backends
from entropic_fast.ops.backend import BackendError, backend_for, implementation, register_family
from entropic_fast.ops.langevin.reference import SCHEMES, UNDERDAMPED, Coefficients

FAMILY = "langevin"
DTYPES = (torch.float32, torch.float64)

# Names of each potential's parameters.
PARAMETERS = {
    "ring": ("stiffness", "contrast", "modes"),
    "ridge": ("stiff", "slope", "length", "wall"),
    "channel": ("stiffness", "contrast", "length"),
}

# Dimensions the kernels have registers for; the reference takes any.
LARGEST_DIM = {"cpp": 16, "triton": 16}

# Largest error of the C++ and Triton normal numbers, in units of the last place. C++ was seen to
# reach 4.6 in 10^7 and 3.2 in 4 10^6 pairs.
NORMAL_ULP = {torch.float32: 6.0, torch.float64: 4.0}

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.langevin.reference",
        "cpp": "entropic_fast.ops.langevin.native",
        "triton": "entropic_fast.ops.langevin.triton",
    },
    writes={"advance": (0, 1)},
)


# ---- public functions ----------------------------------------------------------------------------


def advance(
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
        first_step: steps taken before: the number of the first.
        first_particle: number of the first particle.
        seed: of the noise, in [0, 2^63).
        backend: None for the one in force.

    Raises:
        ValueError: what does not fit.
        BackendError: a backend asked for by name that cannot run here.

    Example:
        >>> x = torch.tensor([[2.0, 0.0]])
        >>> advance(x, potential="ring", parameters=(10.0, 0.0, 1), scheme="euler-maruyama",
        ...         temperature=0.0, dt=0.05, steps=1)
        >>> x
        tensor([[1.5000, 0.0000]])
    """
    for name, tensor in (("x", x), ("v", v)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            got = "one with requires_grad=True"
            raise invalid(
                name, "a tensor that autograd does not follow", got, f"pass {name}.detach()"
            )
    checks.one_of("scheme", scheme, SCHEMES)
    checks.at_least("temperature", temperature, 0.0)
    checks.positive("dt", dt)
    checks.positive("friction", friction)
    c = Coefficients.of(scheme, temperature, dt, friction)
    torch.ops.entropic_fast.langevin_advance(
        x, x.new_empty(0) if v is None else v, potential, [float(p) for p in parameters], scheme,
        c.drift, c.decay, c.noise, steps, first_step, first_particle, seed, backend or "",
    )  # fmt: skip


def box_muller(
    words: Tensor,  # [n, 2] int64 in [0, 2^32)
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
) -> Tensor:  # [n, 2]
    """The kernels' normal numbers from uniform words, to look at their accuracy.

    sqrt(-2 ln u_0) (cos, sin)(2 pi u_1) with u = (word + 1/2) / 2^32.

    Raises:
        ValueError: words of another form.

    >>> box_muller(torch.tensor([[2**31, 2**30]])).round(decimals=3)
    tensor([[-0.0000, 1.1770]], dtype=torch.float64)
    """
    result: Tensor = torch.ops.entropic_fast.langevin_box_muller(words, dtype, backend or "")
    return result


def backend_of(dim: int, device: torch.device | str, setting: str | None = None) -> str:
    """The backend that runs `dim` dimensions on `device`: a kernel if it has room for them.

    Raises:
        BackendError: a backend asked for by name that cannot.

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


@torch.library.custom_op("entropic_fast::langevin_advance", mutates_args=("x", "v"))
def _advance(
    x: Tensor,
    v: Tensor,
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
    backend: str,
) -> None:
    _check(x, v, potential, parameters, scheme, steps, first_step, first_particle, seed)
    _check_apart(x, v)
    setting = backend or None
    chosen = backend_of(x.shape[1], x.device, setting)
    usual = chosen == backend_for(FAMILY, x.device, setting)
    module = implementation(FAMILY, x.device, setting if usual else chosen)
    module.advance(
        x, v, potential, parameters, scheme, drift, decay, noise,
        steps, first_step, first_particle, seed,
    )  # fmt: skip


@_advance.register_fake
def _(
    x: Tensor,
    v: Tensor,
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
    backend: str,
) -> None:
    _check(x, v, potential, parameters, scheme, steps, first_step, first_particle, seed)


@torch.library.custom_op("entropic_fast::langevin_box_muller", mutates_args=())
def _box_muller(words: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    _check_words(words, dtype)
    if words.numel() > 0 and not 0 <= int(words.min()) <= int(words.max()) < 2**32:
        raise invalid("words", "numbers in [0, 2^32)", f"{int(words.min())} to {int(words.max())}")
    module = implementation(FAMILY, words.device, backend or None)
    result: Tensor = module.box_muller(words.contiguous(), dtype)
    return result


@_box_muller.register_fake
def _(words: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    _check_words(words, dtype)
    return torch.empty(words.shape, dtype=dtype, device=words.device)


# ---- checks --------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    v: Tensor,
    potential: str,
    parameters: Sequence[float],
    scheme: str,
    steps: int,
    first_step: int,
    first_particle: int,
    seed: int,
) -> None:
    checks.one_of("potential", potential, PARAMETERS)
    checks.one_of("scheme", scheme, SCHEMES)
    names = PARAMETERS[potential]
    if len(parameters) != len(names) or not all(map(math.isfinite, parameters)):
        raise invalid("parameters", f"finite {', '.join(names)}", shown(tuple(parameters)))
    wanted = "[N, 2]" if potential == "ring" else "[N, D] with D >= 2"
    if x.dim() != 2 or x.shape[1] < 2 or (potential == "ring" and x.shape[1] != 2):
        raise invalid("x", f"shape {wanted} for the {potential}", f"shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise invalid("x", "dtype float32 or float64", str(x.dtype), "convert it first")
    _check_memory("x", x)
    if scheme not in UNDERDAMPED:
        if v.numel() > 0:
            raise invalid("v", f"None for {scheme}", checks.describe(v))
    elif v.shape != x.shape or v.dtype != x.dtype or v.device != x.device:
        expected = f"{checks.describe(x)} on {x.device}, as x, for {scheme}"
        raise invalid("v", expected, f"{checks.describe(v)} on {v.device}")
    else:
        _check_memory("v", v)
    for name, value in (
        ("steps", steps), ("first_step", first_step), ("first_particle", first_particle),
        ("seed", seed),
    ):  # fmt: skip
        checks.integer(name, value)


def _check_memory(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise invalid(
            name,
            "a contiguous tensor",
            f"strides {tuple(tensor.stride())} for shape {list(tensor.shape)}",
            f"pass {name}.contiguous()",
        )


def _check_apart(x: Tensor, v: Tensor) -> None:
    if v.numel() > 0 and abs(x.data_ptr() - v.data_ptr()) < x.numel() * x.element_size():
        raise invalid("v", "memory of its own", "memory shared with x", "pass v.clone()")


def _check_words(words: Tensor, dtype: torch.dtype) -> None:
    if words.dim() != 2 or words.shape[1] != 2 or words.dtype != torch.int64:
        raise invalid("words", "shape [n, 2] of int64", checks.describe(words))
    if dtype not in DTYPES:
        raise invalid("dtype", "float32 or float64", str(dtype))
