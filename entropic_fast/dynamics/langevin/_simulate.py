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


@dataclass(frozen=True)
class LangevinIntegrator:
    """Langevin dynamics at temperature T, and the scheme that discretizes it.

    Overdamped: dx = -grad V dt / friction + sqrt(2 T / friction) dW. With h = dt / friction and
    xi_n standard normal:

    - "euler-maruyama": x' = x - grad V h + sqrt(2 T h) xi_n. Stationary averages are off by O(dt);
      a harmonic well of stiffness k gets variance T / k / (1 - k h / 2). Paths converge with order
      1.
    - "leimkuhler-matthews": x' = x - grad V h + sqrt(2 T h) (xi_n + xi_{n+1}) / 2, the
      high-friction limit of BAOAB (Leimkuhler and Matthews, Appl. Math. Res. Express 2013).
      Stationary averages are off by O(dt^2), and exact for a harmonic well.

    Underdamped, unit masses: dx = v dt, dv = -grad V dt - friction v dt + sqrt(2 T friction) dW:

    - "baoab": half a kick, half a drift, exact friction and noise, half a drift, half a kick
      (Leimkuhler and Matthews 2013). Averages are off by O(dt^2); a harmonic well gets the exact
      variance T / k of x, and T (1 - k dt^2 / 4) of v.

    Each evaluates one force per step.

    Args:
        temperature: T >= 0 in the units of V; 0 is gradient descent (or friction) without noise.
        dt: time step. Stable for stiffness x dt / friction below 2 (overdamped), or stiffness x
            dt^2 below 4 (underdamped).
        scheme: one of the above.
        friction: above 0.

    >>> LangevinIntegrator(0.1, 0.01).scheme
    'leimkuhler-matthews'
    """

    temperature: float
    dt: float
    scheme: str = "leimkuhler-matthews"
    friction: float = 1.0

    def __post_init__(self) -> None:
        checks.at_least("temperature", self.temperature, 0.0)
        checks.positive("dt", self.dt)
        checks.one_of("scheme", self.scheme, SCHEMES)
        checks.positive("friction", self.friction)

    @property
    def underdamped(self) -> bool:
        """Whether particles have velocities."""
        return self.scheme in UNDERDAMPED


@dataclass(frozen=True)
class LangevinRecording:
    """What is recorded of the particles.

    Args:
        every: steps between records; None for the start and the end only.
        observe: what to keep at each record instead of all positions: a function of positions
            [N, D] (and of velocities [N, D], if underdamped) to a tensor of one shape.
    """

    every: int | None = None
    observe: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.every is not None:
            checks.integer("recording.every", self.every, 1)
        checks.functions(observe=self.observe)


@dataclass(frozen=True, eq=False)
class LangevinResult:
    """Independent particles at the recorded times.

    Attributes:
        times: n dt at the records, the first 0, of shape [T].
        positions: of shape [T, N, D]; with `observe` at the end only, [1, N, D].
        integrator, seed: as given.
        backend: what ran: "cpp", "triton" or "reference".
        velocities: of an underdamped scheme, where positions are; otherwise None.
        observed: what `observe` returned at the records, stacked; otherwise None.
    """

    times: Tensor
    positions: Tensor
    integrator: LangevinIntegrator
    seed: int
    backend: str = "reference"
    velocities: Tensor | None = None
    observed: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """Positions at the end, of shape [N, D]."""
        return self.positions[-1]


def simulate_langevin(
    potential: Callable[[Tensor], Tensor],
    start: Tensor | tuple[Tensor, Tensor],
    integrator: LangevinIntegrator,
    steps: int,
    *,
    seed: int = 0,
    recording: LangevinRecording = LangevinRecording(),
    first_particle: int = 0,
    backend: str | None = None,
) -> LangevinResult:
    """Simulate independent particles in a potential V.

    The noise of particle i at step n is a function of (seed, i, n) on any device, so adding
    particles does not change the others. `RingPotential`, `RidgePotential` and `ChannelPotential`
    run in fused kernels, others in PyTorch. Memory does not grow with `steps`, but with the number
    of records.

    Args:
        potential: V, from positions [N, D] to energies [N]; differentiable by autograd, or with a
            method `force` (positions [N, D] to -grad V [N, D]), which is then used.
        start: positions [N, D], float32 or float64; for an underdamped scheme also (positions,
            velocities). Default velocities are drawn from Maxwell's distribution.
        integrator: temperature, time step and scheme.
        steps: number of steps.
        seed: of the noise.
        recording: what is recorded.
        first_particle: the number of start's first particle: particles i to i + N of a larger run
            move as they do there.
        backend: "reference", "cpp" or "triton" for this run; default, the one in force.

    Raises:
        ValueError: arguments that do not fit, or a particle that became NaN or infinite (the
            message names it; lower dt).
        BackendError: a backend asked for by name that cannot run this.

    >>> from entropic_fast import RingPotential
    >>> integrator, every_10 = LangevinIntegrator(0.1, 0.01), LangevinRecording(every=10)
    >>> start = torch.ones(5, 2)
    >>> run = simulate_langevin(RingPotential(), start, integrator, 20, recording=every_10)
    >>> tuple(run.positions.shape), run.times.tolist()
    ((3, 5, 2), [0.0, 0.1, 0.2])
    """
    positions, velocities = _positions_and_velocities(start)
    _check_start(potential, positions)
    checks.instance("integrator", integrator, LangevinIntegrator)
    checks.instance("recording", recording, LangevinRecording)
    checks.integer("steps", steps, 1)
    checks.integer("seed", seed)
    checks.integer("first_particle", first_particle)
    x = positions.detach().clone(memory_format=torch.contiguous_format)
    v = _velocities(velocities, x, integrator, seed, first_particle)
    advance, name = _stepper(potential, x, v, integrator, seed, first_particle, backend)
    every = steps if recording.every is None else recording.every
    records = _Records(x, v, recording.observe)
    records.append()
    times, step, most = [0.0], 0, max(1, CALL // len(x))
    while step < steps:
        until = min(steps, step - step % every + every)
        while step < until:
            more = min(most, until - step)
            advance(step, more)
            step += more
            _check_finite(x, v, integrator.dt, step, first_particle)
        times.append(step * integrator.dt)
        records.append()
    observed = recording.observe is not None
    return LangevinResult(
        times=torch.tensor(times, dtype=torch.float64),
        positions=x[None] if observed else torch.stack(records.positions),
        integrator=integrator,
        seed=seed,
        backend=name,
        velocities=None if v is None else v[None] if observed else torch.stack(records.velocities),
        observed=torch.stack(records.observed) if observed else None,
    )


class _Records:
    """Particles at the recorded times, or what `observe` returned of them."""

    def __init__(self, x: Tensor, v: Tensor | None, observe: Callable[..., Tensor] | None) -> None:
        self._x, self._v, self._observe = x, v, observe
        self.positions: list[Tensor] = []
        self.velocities: list[Tensor] = []
        self.observed: list[Tensor] = []

    def append(self) -> None:
        x, v = self._x, self._v
        if self._observe is None:
            self.positions.append(x.clone())
            if v is not None:
                self.velocities.append(v.clone())
            return
        value = self._observe(x.clone()) if v is None else self._observe(x.clone(), v.clone())
        if not isinstance(value, Tensor):
            raise checks.invalid("observe", "a function to a tensor", checks.describe(value))
        self.observed.append(value.detach().clone())


def _stepper(
    potential: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor | None,
    integrator: LangevinIntegrator,
    seed: int,
    first_particle: int,
    backend: str | None,
) -> tuple[Callable[[int, int], None], str]:
    """The function of (steps done, steps to do) that moves x and v, and the backend's name."""
    key = fold_in(seed, "langevin")
    form = kernel_form(potential)
    if form is not None:

        def fused(step: int, more: int) -> None:
            kernels.langevin_steps(
                x, v, potential=form[0], parameters=form[1], scheme=integrator.scheme,
                dt=integrator.dt, steps=more, temperature=integrator.temperature,
                friction=integrator.friction, first_step=step,
                first_particle=first_particle, seed=key, backend=backend,
            )  # fmt: skip

        return fused, kernels.backend_of(x.shape[1], x.device, backend)

    if backend not in (None, "auto", "reference"):
        raise BackendError(
            f"backend {backend!r} was asked for but runs built-in potentials only, not "
            f"{type(potential).__name__}. Use 'reference' or None."
        )
    force = _force_of(potential, x)
    coefficients = Coefficients.of(
        integrator.scheme, integrator.temperature, integrator.dt, integrator.friction
    )
    noise = noise_like(x, key, first_particle)
    velocities = x.new_empty(0) if v is None else v

    def plain(step: int, more: int) -> None:
        integrate(x, velocities, force, integrator.scheme, coefficients, more, step, noise)

    return plain, "reference"


def _positions_and_velocities(
    start: Tensor | tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(start, tuple):
        return start, None
    if len(start) != 2:
        raise checks.invalid(
            "start", "positions, or (positions, velocities)", checks.describe(start)
        )
    return start


def _velocities(
    start: Tensor | None, x: Tensor, integrator: LangevinIntegrator, seed: int, first_particle: int
) -> Tensor | None:
    if not integrator.underdamped:
        if start is not None:
            raise checks.invalid(
                "start", f"positions alone for {integrator.scheme}", "velocities too"
            )
        return None
    if start is None:
        key, first = fold_in(seed, "langevin", "velocities"), first_particle * x.shape[1]
        draw = normal(tuple(x.shape), key, start=first, dtype=x.dtype, device=x.device)
        return draw * math.sqrt(integrator.temperature)
    if not isinstance(start, Tensor) or start.shape != x.shape:
        raise checks.invalid(
            "start", f"velocities of shape {list(x.shape)}", checks.describe(start)
        )
    checks.finite("start velocities", start)
    return start.detach().to(x).clone(memory_format=torch.contiguous_format)


def _check_start(potential: Callable[[Tensor], Tensor], start: Tensor) -> None:
    if not isinstance(start, Tensor) or start.ndim != 2 or start.numel() == 0:
        raise checks.invalid("start", "positions [N, D]", checks.describe(start))
    checks.finite("start", start)
    if start.dtype not in (torch.float32, torch.float64):
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
    """-grad V: the potential's closed form, or autograd; checked at the start."""
    closed_form = getattr(potential, "force", None)

    def by_autograd(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        energy = potential(leaf)
        if energy.shape != leaf.shape[:1]:
            raise checks.invalid(
                "potential", f"energies of shape [{len(leaf)}]", checks.describe(energy)
            )
        return -torch.autograd.grad(energy.sum(), leaf)[0]

    force: Force = closed_form if callable(closed_form) else by_autograd
    first = force(start)
    if first.shape != start.shape:
        raise checks.invalid(
            "potential.force", f"forces of shape {list(start.shape)}", checks.describe(first)
        )
    checks.finite("force at the start", first.detach())
    return force
