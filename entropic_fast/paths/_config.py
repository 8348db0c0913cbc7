"""Settings of AutoNEB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._utils import checks


def annealed(cycles: int, steps: int, first: float, last: float) -> tuple[tuple[int, float], ...]:
    """Equal cycles with learning rates in a geometric series.

    >>> annealed(3, 10, 0.1, 0.001)
    ((10, 0.1), (10, 0.01), (10, 0.001))
    """
    checks.integer("cycles", cycles, 1)
    checks.positive("first", first)
    checks.positive("last", last)
    ratio = last / first
    # Rounded to 12 digits: 0.01, not 0.010000000000000002.
    rates = [float(f"{first * ratio ** (i / max(1, cycles - 1)):.12g}") for i in range(cycles)]
    return tuple((steps, rate) for rate in rates)


@dataclass(frozen=True)
class AutoNEBConfig:
    """Settings of `auto_neb`; the defaults are the paper's where it gives them.

    The paper: 4 cycles, learning rate annealed from 0.1 to 1e-3. The others are those of Draxler et
    al. (*Essentially no barriers in neural network energy landscape*, ICML 2018): batches of 512,
    1,000 steps per cycle, a pivot inserted where the path deviates by 20 % of the range, rigid
    spacing (an infinite spring constant); momentum and weight decay as in training.

    Args:
        pivots: pivots at the start, on the straight line, both ends counted.
        max_pivots: pivots at most, both ends counted.
        cycles: (steps, learning rate) of each cycle.
        batch_size: examples per step, the same for every pivot; None for all. Each pass over the
            data uses full batches only. A coupled objective always uses all examples.
        momentum: of the pivots' updates, in [0, 1); the buffers start at zero in each cycle.
        weight_decay: c of the term c |theta|^2 / 2 added to the loss that the path descends; 0 for
            an objective that has its own.
        springs: spring constant between pivots; infinity for redistribution to equal arc length
            after every step.
        insert_threshold: a pivot is inserted where the dense loss exceeds the one interpolated
            between pivots by this share of the range of the losses along the path.
        eval_points: points between two pivots in dense evaluations.
        recalibration_examples: examples from which running statistics are re-estimated at each
            point of a dense evaluation; None for all.
        seed: of the order of the minibatches.
        precision: of the float32 products in the gradients that the band descends, on a GPU:
            "float32", or "tf32" (10 bits of mantissa, relative errors of 1e-3 in a gradient, below
            the noise of minibatches; its speed was not measured here). Dense evaluations are always
            in full float32.

    Raises:
        ValueError: a value out of its range.

    >>> AutoNEBConfig(pivots=5, cycles=annealed(2, 50, 0.1, 0.01)).steps
    100
    """

    pivots: int = 9
    max_pivots: int = 31
    cycles: Sequence[tuple[int, float]] = annealed(4, 1000, 0.1, 1e-3)
    batch_size: int | None = 512
    momentum: float = 0.9
    weight_decay: float = 5e-4
    springs: float = math.inf
    insert_threshold: float = 0.2
    eval_points: int = 9
    recalibration_examples: int | None = None
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        checks.integer("pivots", self.pivots, 3)
        checks.integer("max_pivots", self.max_pivots, self.pivots)
        try:
            cycles = tuple((steps, lr) for steps, lr in self.cycles)
        except (TypeError, ValueError) as error:
            raise checks.invalid(
                "cycles", "pairs (steps, learning rate), one per cycle", checks.shown(self.cycles)
            ) from error
        if not cycles:
            raise checks.invalid("cycles", "at least one (steps, learning rate)", "none")
        for i, (steps, lr) in enumerate(cycles):
            checks.integer(f"cycles[{i}] steps", steps, 1)
            checks.positive(f"cycles[{i}] learning rate", lr)
        object.__setattr__(self, "cycles", cycles)
        if self.batch_size is not None:
            checks.integer("batch_size", self.batch_size, 1)
        if checks.at_least("momentum", self.momentum, 0) >= 1:
            raise checks.invalid("momentum", "a number in [0, 1)", checks.shown(self.momentum))
        checks.at_least("weight_decay", self.weight_decay, 0)
        if not (isinstance(self.springs, float) and self.springs == math.inf):
            checks.positive("springs", self.springs)
        checks.positive("insert_threshold", self.insert_threshold)
        checks.integer("eval_points", self.eval_points, 1)
        if self.recalibration_examples is not None:
            checks.integer("recalibration_examples", self.recalibration_examples, 1)
        checks.integer("seed", self.seed)
        checks.one_of("precision", self.precision, ("float32", "tf32"))

    @property
    def steps(self) -> int:
        """Steps over all cycles."""
        return sum(steps for steps, _ in self.cycles)
