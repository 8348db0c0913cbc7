"""The cost model of distributed work: operations, messages, memory and seconds of each process.

The model has one measured speed for each of four things: gradients, products of rows, bytes sent
and messages. `PASSES` is the cost of everything else in gradients: benchmarks of convolutional
networks on a CPU gave that of products, forms and norms; that of the loss and of rows of scores is
an estimate. Measured times were 0.43 to 1.5 times those of the model (docs/scale.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .._utils import checks
from ..objective import Objective
from ..ops.gram_update import cross_update_

# Gradients per example that a quantity costs, once and for each column.
PASSES: dict[str, tuple[float, float]] = {
    "loss": (0.35, 0.0),
    "gradient": (1.0, 0.0),
    "products": (0.75, 1.75),
    "forms": (0.4, 0.85),
    "norms": (0.95, 0.0),
    "gram": (1.3, 0.0),
}
ROUNDS = 5
MEASURED_EXAMPLES = 256
MEASURED_ROWS, MEASURED_COLUMNS = 256, 8192


@dataclass(frozen=True)
class Machine:
    """Speeds of one process among others like it.

    Attributes:
        gradient: seconds for the gradient of one example.
        multiply: multiplications (each with an addition) of rows of scores a second.
        bandwidth: bytes a second that a process sends while all do.
        latency: seconds that a message takes, however short.
        operations: floating-point operations of the gradient of one example, in its matrix
            products and convolutions; 0 if they were not counted.
    """

    gradient: float
    multiply: float
    bandwidth: float
    latency: float
    operations: float = 0.0


_SUMMED = ("gradients", "multiplications", "sent", "messages")


@dataclass(frozen=True)
class Work:
    """The work of each of several processes; the slowest counts."""

    quantity: str
    processes: int
    gradients: float = 0.0  # of single examples
    multiplications: float = 0.0  # of rows of scores
    sent: float = 0.0  # bytes
    messages: int = 0
    memory: float = 0.0  # bytes of results and messages, besides activations

    def __add__(self, other: Work) -> Work:
        """One after the other, with the larger memory."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return replace(self, **sums, memory=max(self.memory, other.memory))

    def times(self, count: int) -> Work:
        """The same `count` times."""
        return replace(self, **{name: count * getattr(self, name) for name in _SUMMED})

    def on(self, machine: Machine) -> Cost:
        """With the operations and seconds that it takes on a machine."""
        operations = self.gradients * machine.operations + 2 * self.multiplications
        seconds = (
            self.gradients * machine.gradient
            + self.multiplications / machine.multiply
            + self.sent / machine.bandwidth
            + self.messages * machine.latency
        )
        return Cost(**vars(self), operations=operations, seconds=seconds)


@dataclass(frozen=True)
class Cost(Work):
    """`Work` on a machine.

    Attributes:
        operations: floating-point operations, where the machine knows a gradient's.
        seconds: in all.
    """

    operations: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.quantity} on {self.processes} processes: {self.seconds:.3g} s; of each "
            f"{self.gradients:.3g} gradients, {self.multiplications:.3g} multiplications of "
            f"scores, {self.sent:.3g} bytes sent in {self.messages} messages, "
            f"{self.memory / 2**20:.3g} MiB"
        )


def expected_cost(
    quantity: str,
    machine: Machine,
    *,
    examples: int,
    parameters: int,
    columns: int = 1,
    processes: int = 1,
    itemsize: int = 4,
) -> Cost:
    """What a quantity takes, by the arithmetic of how `distributed.distribute` shares it.

    Sums are reduced in a ring: for b bytes each of W processes sends 2 b (W - 1) / W in 2 (W - 1)
    messages. For the Gram matrix it first sends its rows to W / 2 others.

    Args:
        quantity: "loss", "gradient", "products", "forms", "norms" or "gram".
        machine: of `measure`, or assumed.
        examples, parameters: N and P.
        columns: K, of products and forms; probes of a trace.
        processes: W.
        itemsize: bytes of a parameter.

    Raises:
        ValueError: an unknown quantity, or numbers under 1.

    >>> machine = Machine(gradient=1e-3, multiply=1e10, bandwidth=1e9, latency=1e-5)
    >>> one, ten = (
    ...     expected_cost("forms", machine, examples=1000, parameters=10**6, columns=8, processes=w)
    ...     for w in (1, 10)
    ... )
    >>> round(one.seconds, 2), round(one.seconds / ten.seconds, 1), int(ten.sent)
    (7.2, 10.0, 403)
    """
    shape = {"examples": examples, "parameters": parameters, "itemsize": itemsize}
    return work_of(quantity, columns=columns, processes=processes, **shape).on(machine)


def work_of(
    quantity: str,
    *,
    examples: int,
    parameters: int,
    columns: int = 1,
    processes: int = 1,
    itemsize: int = 4,
) -> Work:
    """`expected_cost` without a machine.

    >>> work_of("products", examples=100, parameters=10, columns=2, processes=4).gradients
    106.25
    """
    checks.one_of("quantity", quantity, tuple(PASSES))
    for name, value in (("examples", examples), ("parameters", parameters)):
        checks.integer(name, value, 1)
    checks.integer("columns", columns, 1)
    w = checks.integer("processes", processes, 1)
    own = ceil(examples / w)
    once, each = PASSES[quantity]
    gradients = own * (once + each * columns)
    result = {
        "loss": 8 * examples,
        "gradient": itemsize * parameters,
        "products": itemsize * parameters * columns,
        "forms": 8 * columns,
        "norms": 8 * examples,
        "gram": 8 * examples**2,
    }[quantity]
    agreement = 32 * w  # status words
    sent = (2 * result + agreement) * (w - 1) / w
    messages = 3 * (w - 1)
    memory, multiplications = float(result), 0.0
    if quantity == "gram":
        rows = itemsize * own * parameters
        met = w // 2
        # The rows, and status words before them, after them and after the blocks.
        sent += met * rows + 3 * agreement * (w - 1) / w
        messages += met + 3 * (w - 1)
        memory += (3 if w > 1 else 1) * rows
        multiplications = own * (examples + own) / 2 * parameters
    return Work(quantity, w, gradients, multiplications, sent, messages, memory)


def path_work(
    *, pivots: int, batch_size: int, steps: int, parameters: int, processes: int = 1,
    itemsize: int = 4,
) -> Work:  # fmt: skip
    """AutoNEB's updates on each process: the gradients of its pivots, then the sum over all.

    >>> path_work(pivots=9, batch_size=10, steps=2, parameters=5, processes=4).gradients
    60.0
    """
    w = checks.integer("processes", processes, 1)
    summed = 8 * pivots * parameters  # in float64
    return Work(
        "path",
        w,
        gradients=float(ceil(pivots / w) * batch_size),
        sent=2 * summed * (w - 1) / w,
        messages=3 * (w - 1),
        memory=4 * itemsize * pivots * parameters + summed * (w > 1),
    ).times(steps)


def relaxation_work(
    *, replicas: int, batch_size: int, steps: int, parameters: int, processes: int = 1,
    itemsize: int = 4,
) -> Work:  # fmt: skip
    """Updates of each process's replicas, then their records.

    An update costs as much as 8 examples more than its minibatch has.

    >>> relaxation_work(replicas=3, batch_size=8, steps=10, parameters=5, processes=2).gradients
    320.0
    """
    w = checks.integer("processes", processes, 1)
    own = ceil(replicas / w)
    return Work(
        "relax",
        w,
        gradients=float(own * steps * (batch_size + 8)),
        messages=9 * (w - 1),
        memory=4 * itemsize * own * parameters,
    )


def measure(obj: Objective) -> Machine:
    """The speeds of this process; of a distributed objective those of the slowest process.

    Without other processes nothing is sent: infinite bandwidth, no latency.

    >>> obj = Objective(torch.nn.Linear(3, 2), "mse", (torch.ones(8, 3), torch.zeros(8, 2)))
    >>> measure(obj).latency, measure(obj).gradient > 0
    (0.0, True)
    """
    count = min(obj.num_examples, MEASURED_EXAMPLES)
    few = obj.without_distribution()
    if obj.examples.are_tensors:
        size = min(count, obj.examples.batch_size)
        few = few.sampled(*obj.tensors(count), batch_size=size)
    gradient = _fastest(few.gradient) / few.num_examples
    operations = count_operations(few.gradient) / few.num_examples
    rows = torch.ones(MEASURED_ROWS, MEASURED_COLUMNS, device=obj.device)
    out = torch.zeros(MEASURED_ROWS, MEASURED_ROWS, dtype=torch.float64, device=obj.device)
    seconds = _fastest(lambda: cross_update_(out, rows, rows, double_products=True))
    multiply = MEASURED_ROWS**2 * MEASURED_COLUMNS / seconds
    if obj.communicator.size == 1:
        return Machine(gradient, multiply, float("inf"), 0.0, operations)
    communicator, size = obj.communicator, obj.communicator.size
    short = torch.zeros(1, device=obj.device)
    long = torch.zeros(max(2**20, obj.num_params), device=obj.device)
    latency = _fastest(lambda: communicator.all_reduce(lambda: short)) / (3 * (size - 1))
    seconds = _fastest(lambda: communicator.all_reduce(lambda: long)) - 3 * (size - 1) * latency
    bandwidth = 2 * long.nbytes * (size - 1) / size / max(seconds, 1e-9)
    # The slowest process decides each, because the others wait for it.
    mine = torch.tensor([gradient, 1 / multiply, 1 / bandwidth, latency], dtype=torch.float64)
    slowest = torch.zeros(size, 4, dtype=torch.float64)
    slowest[communicator.rank] = mine
    found = communicator.all_reduce(lambda: slowest.to(obj.device)).amax(0).tolist()
    return Machine(found[0], 1 / found[1], 1 / found[2], found[3], operations)


def count_operations(action: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions in `action`.

    >>> count_operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
    48.0
    """
    with FlopCounterMode(display=False) as counter:
        action()
    return float(counter.get_total_flops())


def timings(action: Callable[[], object], rounds: int, seconds: float = 0.0) -> list[float]:
    """Seconds of each of at least so many calls, which take at least so long in all."""
    taken: list[float] = []
    while len(taken) < rounds or sum(taken) < seconds:
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def _fastest(action: Callable[[], Tensor | None]) -> float:
    return min(timings(action, ROUNDS + 1)[1:])  # the first call is slower


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
