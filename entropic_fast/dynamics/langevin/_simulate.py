"""Langevin dynamics of many independent particles, overdamped or with inertia."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils import checks
from ...ops import langevin as kernels
from ...ops.backend import BackendError
from ...ops.langevin.forces import Force
from ...ops.langevin.reference import SCHEMES, UNDERDAMPED, Coefficients, integrate, noise_like
from ...ops.random_bits.streams import fold_in, normal
from ._potentials import kernel_form

# Particle-steps of one call of a kernel: about a second, so that a run can be interrupted.
CALL = 2**28


@dataclass(frozen=True, eq=False)
class LangevinResult:
    """Independent particles at the recorded times.

    Attributes:
        times: n dt at the records, the first 0.  # [T]
        positions: with `observe`, at the end only.  # [T, N, D], or [1, N, D]
        temperature, dt, scheme, seed, friction: as given.
        backend: what ran: "cpp", "triton" or "reference".
        velocities: of an underdamped scheme, where positions are; otherwise None.
        observed: what `observe` returned at the records, stacked; None without.  # [T, ...]
    """

    times: Tensor
    positions: Tensor
    temperature: float
    dt: float
    scheme: str
    seed: int
    friction: float = 1.0
    backend: str = "reference"
    velocities: Tensor | None = None
    observed: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """Positions at the end.  # [N, D]"""
        return self.positions[-1]


def simulate_langevin(
    potential: Callable[[Tensor], Tensor],
    start: Tensor,  # [N, D]
    temperature: float,
    dt: float,
    steps: int,
    *,
    seed: int = 0,
    record_every: int | None = None,
    scheme: str = "leimkuhler-matthews",
    friction: float = 1.0,
    start_velocities: Tensor | None = None,  # [N, D]
    observe: Callable[..., Tensor] | None = None,
    first_particle: int = 0,
    backend: str | None = None,
) -> LangevinResult:
    """Particles, independent of each other, in a potential V at temperature T.

    Overdamped: dx = -grad V dt / friction + sqrt(2 T / friction) dW. With h = dt / friction and
    xi_n standard normal:

    - "euler-maruyama": x' = x - grad V h + sqrt(2 T h) xi_n. Stationary averages are off by
      O(dt); a harmonic well of stiffness k gets variance T / k / (1 - k h / 2). Paths converge
      with order 1.
    - "leimkuhler-matthews": x' = x - grad V h + sqrt(2 T h) (xi_n + xi_{n+1}) / 2 (the
      high-friction limit of BAOAB; Leimkuhler and Matthews, Appl. Math. Res. Express 2013).
      One force a step too, stationary averages off by O(dt^2), exact for a harmonic well.

    Underdamped, unit masses: dx = v dt, dv = -grad V dt - friction v dt + sqrt(2 T friction) dW:

    - "baoab": half a kick, half a drift, friction and noise exactly, half a drift, half a kick
      (Leimkuhler and Matthews 2013). One force a step, averages off by O(dt^2); a harmonic well
      gets the exact variance T / k of x, and T (1 - k dt^2 / 4) of v.

    The noise of particle i at step n is a function of (seed, i, n), on any device; more particles
    change nobody's noise. `RingPotential`, `RidgePotential` and `ChannelPotential` run in fused
    kernels, in which particles stay in registers between records; other potentials in PyTorch.
    Memory: the records, and a few copies of the particles; it does not grow with `steps`.

    Args:
        potential: V, from positions [N, D] to energies [N]; differentiable by autograd, or with
            a method `force` (positions [N, D] to -grad V [N, D]), which is then used.
        start: positions, float32 or float64.  # [N, D]
        temperature: T >= 0 in the units of V; 0 is gradient descent (or friction) without noise.
        dt: time step. Overdamped, stiffness x dt / friction must stay below 2 for stability;
            underdamped, stiffness x dt^2 below 4.
        steps: number of steps.
        seed: of the noise.
        record_every: steps between records; None for the start and the end only.
        scheme: one of the above.
        friction: above 0.
        start_velocities: of an underdamped scheme; None for Maxwell's, at T.  # [N, D]
        observe: what to keep at each record instead of all positions: a function of positions
            [N, D] (and of velocities [N, D], for an underdamped scheme) to a tensor of one shape.
        first_particle: the number of start's first particle: particles i to i + N of a larger run
            move as they do there.
        backend: "reference", "cpp" or "triton" for this run; None for the one in force.

    Raises:
        ValueError: arguments that do not fit, or a particle that became NaN or infinite (the
            message names it; a smaller dt is the cure).
        BackendError: a backend asked for by name that cannot run this.

    >>> from entropic_fast.dynamics import RingPotential
    >>> run = simulate_langevin(RingPotential(), torch.ones(5, 2), 0.1, 0.01, 20, record_every=10)
    >>> tuple(run.positions.shape), run.times.tolist()
    ((3, 5, 2), [0.0, 0.1, 0.2])
    """
    _check_start(potential, start)
    checks.functions(observe=observe)
    checks.at_least("temperature", temperature, 0.0)
    checks.positive("dt", dt)
    checks.integer("steps", steps, 1)
    checks.integer("seed", seed)
    checks.one_of("scheme", scheme, SCHEMES)
    checks.positive("friction", friction)
    checks.integer("first_particle", first_particle)
    every = steps if record_every is None else checks.integer("record_every", record_every, 1)

    x = start.detach().clone(memory_format=torch.contiguous_format)
    v = _velocities(start_velocities, x, scheme, temperature, seed, first_particle)
    advance, name = _integrator(
        potential, x, v, scheme, temperature, dt, friction, seed, first_particle, backend
    )

    times, records, fast, observed = [0.0], [], [], []

    def record() -> None:
        if observe is not None:
            seen = observe(x.clone()) if v is None else observe(x.clone(), v.clone())
            if not isinstance(seen, Tensor):
                raise checks.invalid("observe", "a function to a tensor", checks.describe(seen))
            observed.append(seen.detach().clone())
        else:
            records.append(x.clone())
            if v is not None:
                fast.append(v.clone())

    record()
    step, most = 0, max(1, CALL // len(x))
    while step < steps:
        until = min(steps, step - step % every + every)
        while step < until:
            more = min(most, until - step)
            advance(step, more)
            step += more
            _check_finite(x, v, dt, step, first_particle)
        times.append(step * dt)
        record()
    return LangevinResult(
        torch.tensor(times, dtype=torch.float64),
        torch.stack(records) if observe is None else x[None],
        float(temperature),
        float(dt),
        scheme,
        seed,
        float(friction),
        name,
        None if v is None else torch.stack(fast) if observe is None else v[None],
        torch.stack(observed) if observed else None,
    )


def _integrator(
    potential: Callable[[Tensor], Tensor],
    x: Tensor,  # [N, D], updated in place
    v: Tensor | None,  # [N, D], updated in place
    scheme: str,
    temperature: float,
    dt: float,
    friction: float,
    seed: int,
    first_particle: int,
    backend: str | None,
) -> tuple[Callable[[int, int], None], str]:
    """A function of (steps taken, steps to take), and the name of what runs it."""
    key = fold_in(seed, "langevin")
    form = kernel_form(potential)
    if form is not None:

        def fused(step: int, more: int) -> None:
            kernels.advance(
                x, v, potential=form[0], parameters=form[1], scheme=scheme, dt=dt, steps=more,
                temperature=temperature, friction=friction, first_step=step,
                first_particle=first_particle, seed=key, backend=backend,
            )  # fmt: skip

        return fused, kernels.backend_of(x.shape[1], x.device, backend)

    if backend not in (None, "auto", "reference"):
        raise BackendError(
            f"backend {backend!r} was asked for but runs built-in potentials only, not "
            f"{type(potential).__name__}. Use 'reference' or None."
        )
    force = _force_of(potential, x)
    coefficients = Coefficients.of(scheme, temperature, dt, friction)
    noise = noise_like(x, key, first_particle)
    velocities = x.new_empty(0) if v is None else v

    def plain(step: int, more: int) -> None:
        integrate(x, velocities, force, scheme, coefficients, more, step, noise)

    return plain, "reference"


def _velocities(
    given: Tensor | None,  # [N, D]
    x: Tensor,  # [N, D]
    scheme: str,
    temperature: float,
    seed: int,
    first_particle: int,
) -> Tensor | None:  # [N, D]
    if scheme not in UNDERDAMPED:
        if given is not None:
            raise checks.invalid("start_velocities", f"None for {scheme}", checks.describe(given))
        return None
    if given is None:
        key, start = fold_in(seed, "langevin", "velocities"), first_particle * x.shape[1]
        draw = normal(tuple(x.shape), key, start=start, dtype=x.dtype, device=x.device)
        return draw * math.sqrt(temperature)
    if not isinstance(given, Tensor) or given.shape != x.shape:
        raise checks.invalid(
            "start_velocities", f"velocities of shape {list(x.shape)}", checks.describe(given)
        )
    checks.finite("start_velocities", given)
    own = given.detach().to(x)
    return own.clone(memory_format=torch.contiguous_format)


def _check_start(potential: Callable[[Tensor], Tensor], start: Tensor) -> None:
    if not isinstance(start, Tensor) or start.ndim != 2 or start.numel() == 0:
        raise checks.invalid("start", "positions [N, D]", checks.describe(start))
    checks.finite("start", start)
    if start.dtype not in kernels.DTYPES:
        raise checks.invalid("start", "float32 or float64", checks.describe(start))
    if not callable(potential):
        raise checks.invalid(
            "potential",
            "a function of positions [N, D], or RingPotential()",
            checks.shown(potential),
        )
    dim = getattr(potential, "dim", start.shape[1])
    if dim != start.shape[1]:
        raise checks.invalid(
            "start", f"positions [N, {dim}] for this potential", checks.describe(start)
        )


def _check_finite(
    x: Tensor,  # [N, D]
    v: Tensor | None,  # [N, D]
    dt: float,
    step: int,
    first_particle: int,
) -> None:
    finite = torch.isfinite(x) if v is None else torch.isfinite(x) & torch.isfinite(v)
    if bool(finite.all()):
        return
    worst = int((~finite).any(1).nonzero()[0])
    raise checks.invalid(
        "dt",
        "a step at which every particle stays finite",
        f"{dt}, with particle {first_particle + worst} not finite by step {step}",
        "lower dt, or start away from singular points",
    )


def _force_of(potential: Callable[[Tensor], Tensor], start: Tensor) -> Force:
    """-grad V: the potential's own closed form, or autograd; checked at the start."""
    own = getattr(potential, "force", None)

    def by_autograd(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        energy = potential(leaf)
        if energy.shape != leaf.shape[:1]:
            raise checks.invalid(
                "potential", f"energies of shape [{len(leaf)}]", checks.describe(energy)
            )
        return -torch.autograd.grad(energy.sum(), leaf)[0]

    force: Force = own if callable(own) else by_autograd
    first = force(start)
    if first.shape != start.shape:
        raise checks.invalid(
            "potential.force", f"forces of shape {list(start.shape)}", checks.describe(first)
        )
    checks.finite("force at the start", first.detach())
    return force
