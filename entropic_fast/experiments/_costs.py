"""What a shared computation takes of each process: operations, messages, memory, seconds.

The model has one measured speed for each of four things: gradients, products of rows, bytes sent
and messages. `PASSES` is the price of everything else in gradients: of products, forms and norms as
benchmarks have it for networks of convolutions on a CPU, of the loss and of rows of scores by
estimate. Times were 0.43 to 1.5 times those measured; the documentation's page on scale has both.
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

# Gradients that a quantity costs an example, once and for each column.
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


@dataclass(frozen=True)
class Work:
    """What is done by each of several processes; the slowest counts.

    Attributes:
        quantity, processes: what, and on how many.
        gradients: work in gradients of single examples.
        multiplications: of rows of scores.
        sent, messages: bytes and messages that a process sends.
        memory: bytes of results and of what is exchanged (activations come on top).
    """

    quantity: str
    processes: int
    gradients: float = 0.0
    multiplications: float = 0.0
    sent: float = 0.0
    messages: int = 0
    memory: float = 0.0

    def __add__(self, other: Work) -> Work:
        """One after the other, of which the larger memory is needed."""
        return replace(
            self,
            gradients=self.gradients + other.gradients,
            multiplications=self.multiplications + other.multiplications,
            sent=self.sent + other.sent,
            messages=self.messages + other.messages,
            memory=max(self.memory, other.memory),
        )

    def times(self, count: int) -> Work:
        """The same so many times."""
        return replace(
            self,
            gradients=count * self.gradients,
            multiplications=count * self.multiplications,
            sent=count * self.sent,
            messages=count * self.messages,
        )

    def on(self, machine: Machine) -> Cost:
        """With what it takes there."""
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
        seconds: all in all.
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

    Sums are put together by a ring: of b bytes each of W processes sends 2 b (W - 1) / W in
    2 (W - 1) messages. The Gram matrix sends rows to W / 2 others first.

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
    return work_of(
        quantity,
        examples=examples,
        parameters=parameters,
        columns=columns,
        processes=processes,
        itemsize=itemsize,
    ).on(machine)


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
    agreement = 32 * w  # each process says how it fares
    sent = (2 * result + agreement) * (w - 1) / w
    messages = 3 * (w - 1)
    memory, multiplications = float(result), 0.0
    if quantity == "gram":
        rows = itemsize * own * parameters
        met = w // 2
        # Rows, and meetings before them, after them and after the blocks.
        sent += met * rows + 3 * agreement * (w - 1) / w
        messages += met + 3 * (w - 1)
        memory += (3 if w > 1 else 1) * rows
        multiplications = own * (examples + own) / 2 * parameters
    return Work(quantity, w, gradients, multiplications, sent, messages, memory)


def path_work(
    *, pivots: int, batch_size: int, steps: int, parameters: int, processes: int = 1,
    itemsize: int = 4,
) -> Work:  # fmt: skip
    """What AutoNEB's updates take of each process: its pivots' gradients, then all pivots'.

    Args:
        pivots, batch_size, steps: M, examples of an update, and updates.
        parameters, processes, itemsize: as for `expected_cost`.

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
    """What updates of replicas take of each process: of its own ones, then their records.

    An update costs as much as 8 examples besides those of its minibatch.

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
    """The speeds of this process, of all that share an objective the slowest.

    An objective that no processes share sends nothing: infinite bandwidth, no latency.

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
    taken = _fastest(lambda: cross_update_(out, rows, rows, double_products=True))
    multiply = MEASURED_ROWS**2 * MEASURED_COLUMNS / taken
    if obj.communicator.size == 1:
        return Machine(gradient, multiply, float("inf"), 0.0, operations)
    communicator, size = obj.communicator, obj.communicator.size
    short = torch.zeros(1, device=obj.device)
    long = torch.zeros(max(2**20, obj.num_params), device=obj.device)
    latency = _fastest(lambda: communicator.all_reduce(lambda: short)) / (3 * (size - 1))
    taken = _fastest(lambda: communicator.all_reduce(lambda: long)) - 3 * (size - 1) * latency
    bandwidth = 2 * long.nbytes * (size - 1) / size / max(taken, 1e-9)
    # The slowest of each: others wait for it.
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


def _fastest(action: Callable[[], Tensor | None]) -> float:
    action()
    taken = []
    for _ in range(ROUNDS):
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
