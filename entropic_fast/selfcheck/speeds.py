"""How fast this machine does each kind of work, in plain gradients and as a share of its limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import models
from ..curvature import HessianOperator, gradient_norms, score_gram
from ..devices import is_gpu
from ..dynamics import relax
from ..objective import Objective
from ..ops.jet import push
from ..ops.score_gram import symmetric_update_
from ..ops.step import project_step, segment_squares, sgd_step
from ..paths import linear_path

COLUMNS = 4  # vectors of a product
ROUNDS = 7  # at most
SECONDS = 30.0  # after which no further round begins
REPLICAS = 4
CYCLE, WARM, TIMED = 5, 3, 2  # updates a cycle; cycles before the clock starts, and under it


GRADIENT, NORMS, GRAM = "plain gradient", "gradient norms", "Gram matrix"
UPDATE = f"SGD update, {REPLICAS} replicas"


@dataclass(frozen=True)
class Sizes:
    """What is timed on a device: about a second a round on two cores, and on a large GPU."""

    model: str
    images: int  # of 3 x 32 x 32
    copied: int  # bytes
    matrix: int  # rows and columns
    rows: int  # of the Gram kernel, with `columns`
    columns: int
    parameters: int  # of each of `REPLICAS` replicas of the step
    pixels: int  # of the jets' normalization, of 64 channels


ROOMY = 32 * 2**30  # bytes free on a GPU that is timed at large sizes
CPU = Sizes("resnet20", 16, 2**26, 1024, 128, 16384, 250_000, 8192)
SMALL_GPU = Sizes("resnet20", 64, 2**28, 4096, 512, 65536, 1_000_000, 65536)
GPU = Sizes("resnet20", 512, 2**30, 8192, 1024, 262_144, 4_000_000, 262_144)


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, the best of all rounds.

    Attributes:
        bandwidth: bytes/s of a copy, read and written.
        float32, float64: FLOP/s of a matrix product, in full precision.
    """

    bandwidth: float
    float32: float
    float64: float


@dataclass(frozen=True)
class Speed:
    """Time of one kind of work.

    Attributes:
        name: the work.
        seconds: median of `rounds` interleaved rounds; of products and probes, a vector.
        gradients: the same in plain gradients of the same images; None for kernels alone.
        bandwidth: least bytes to be moved, over time, as a share of the copy bandwidth; or None.
        arithmetic: products and sums, over time, as a share of the rate of a matrix product of
            the same precision; or None. Those of products and probes are counted, others are
            the least that the work needs.
    """

    name: str
    seconds: float
    rounds: int
    gradients: float | None = None
    bandwidth: float | None = None
    arithmetic: float | None = None


@dataclass(frozen=True)
class _Work:
    call: Callable[[], Any]
    share: float = 1.0  # of one call's time that is reported
    flops: float | None = None  # None: counted, where no bytes are given either
    double: bool = False  # arithmetic in float64
    bytes: float | None = None


def to_dict(limits: Limits, speeds: list[Speed]) -> dict[str, Any]:
    """Plain values that JSON can hold."""
    return {"limits": asdict(limits), "work": [asdict(speed) for speed in speeds]}


def measure(
    device: torch.device, sizes: Sizes | None = None, rounds: int = ROUNDS
) -> tuple[Limits, list[Speed]]:
    """Time every kind of work on a device, in turns; medians.

    Args:
        sizes: what is timed; None for those of the kind of device.
        rounds: at most; fewer where they take longer than 30 s.
    """
    sizes = sizes or _sizes(device)
    network, kernels, edges = (
        _network(device, sizes),
        _kernels(device, sizes),
        _edges(device, sizes),
    )
    both = {**network, **kernels}
    calls = {name: work.call for name, work in {**both, **edges}.items()}
    for call in calls.values():
        call()
    flops = {name: _count(work) for name, work in both.items()}
    # At least a gradient of as many images; what torch counts under vmap is not to be trusted.
    for name in (UPDATE, NORMS, GRAM):
        flops[name] += flops[GRADIENT]
    seconds = _take_turns(calls, device, rounds)
    taken = {name: statistics.median(found) for name, found in seconds.items()}
    best = {
        name: (work.bytes or work.flops or 0.0) / min(seconds[name]) for name, work in edges.items()
    }
    limits = Limits(*best.values())
    speeds = []
    for name, work in both.items():
        rate = limits.float64 if work.double else limits.float32
        speeds.append(
            Speed(
                name,
                taken[name] * work.share,
                len(seconds[name]),
                taken[name] * work.share / taken[GRADIENT] if name in network else None,
                work.bytes / taken[name] / limits.bandwidth if work.bytes else None,
                flops[name] / taken[name] / rate if flops[name] else None,
            )
        )
    return limits, speeds


def _sizes(device: torch.device) -> Sizes:
    if not is_gpu(device):
        return CPU
    return GPU if torch.cuda.mem_get_info(device)[0] > ROOMY else SMALL_GPU


def _network(device: torch.device, sizes: Sizes) -> dict[str, _Work]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sizes.images, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (sizes.images,), generator=generator)
    model = models.initialise(models.build(sizes.model), 0).eval()
    obj = Objective(model, "cross_entropy", (images, labels), device=device)
    network, x, y = model.to(device), images.to(device), labels.to(device)
    weights = [p for p in network.parameters() if p.requires_grad]
    hessian = HessianOperator(obj)
    vectors = torch.randn(obj.num_params, COLUMNS, generator=generator).to(device)
    start = obj.parameters_vector()
    path = linear_path(start, start + 0.1 * vectors[:, 0] * start.norm() / vectors[:, 0].norm(), 3)
    batch = max(1, sizes.images // REPLICAS)

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(network(x), y), weights)

    def update() -> float:
        """Seconds of an update, in cycles that are warm and, on a GPU, graphs."""
        clock: list[float] = []

        def record(_: Any) -> None:
            _synchronize(device)
            clock.append(time.perf_counter())

        relax(
            obj, path, 0.5, lr=1e-3, batch_size=batch, project_every=CYCLE,
            steps=CYCLE * (WARM + TIMED), replicas=REPLICAS, on_record=record,
        )  # fmt: skip
        return (clock[-1] - clock[-1 - TIMED]) / (CYCLE * TIMED)

    return {
        GRADIENT: _Work(gradient),
        "Hessian product, a column": _Work(lambda: hessian @ vectors, 1 / COLUMNS),
        "trace probe": _Work(lambda: hessian.quadratic_forms(vectors), 1 / COLUMNS),
        NORMS: _Work(lambda: gradient_norms(obj), flops=0.0),
        GRAM: _Work(lambda: score_gram(obj), flops=len(x) * (len(x) + 1.0) * obj.num_params),
        UPDATE: _Work(update, flops=0.0),
    }


def _kernels(device: torch.device, sizes: Sizes) -> dict[str, _Work]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    rows, gram = random(sizes.rows, sizes.columns), random(sizes.rows, sizes.rows).double()
    theta, grad, pivots = (random(n, sizes.parameters) for n in (REPLICAS, REPLICAS, 5))
    rates = torch.full((REPLICAS,), 1e-3, dtype=torch.float64, device=device)
    squares = segment_squares(pivots)
    m, c = sizes.pixels, 64
    u, normal, scale, slope = random(COLUMNS, m, c), random(m, c), random(c), random(m, c)
    out = torch.empty_like(u)

    def step() -> None:
        project_step(theta, sgd_step(theta, grad, lr=rates, pivots=pivots), pivots, squares)

    return {
        "kernel: Gram update": _Work(
            lambda: symmetric_update_(gram, rows, double_products=True),
            flops=sizes.rows * (sizes.rows + 1) * sizes.columns,
            double=True,
            bytes=rows.nbytes + gram.nbytes,
        ),
        # theta read and written twice, the gradient once, the pivots once, two of them again.
        "kernel: projected step": _Work(step, bytes=4 * theta.nbytes + grad.nbytes + pivots.nbytes),
        "kernel: jet": _Work(
            lambda: push(u, normal=normal, scale=scale, slope=slope, out=out),
            bytes=2 * u.nbytes + slope.nbytes,
        ),
    }


def _edges(device: torch.device, sizes: Sizes) -> dict[str, _Work]:
    """What the machine does at most, timed in turns with the rest: its load meets all alike."""
    source = torch.ones(sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    a = torch.randn(sizes.matrix, sizes.matrix, device=device)
    b = torch.randn(sizes.matrix // 2, sizes.matrix // 2, device=device).double()
    return {
        "copy": _Work(lambda: target.copy_(source), bytes=2 * source.nbytes),
        "float32": _Work(lambda: a @ a, flops=2 * len(a) ** 3),
        "float64": _Work(lambda: b @ b, flops=2 * len(b) ** 3),
    }


def _count(work: _Work) -> float:
    """Products and sums of one call; of a network's, those of convolutions and matrix products."""
    if work.flops is not None or work.bytes is not None:
        return work.flops or 0.0
    with FlopCounterMode(display=False) as counter:
        work.call()
    return float(counter.get_total_flops())


def _take_turns(
    works: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each, one a round, or what it says itself."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > SECONDS:
            break
        for name, call in works.items():
            _synchronize(device)
            before = time.perf_counter()
            said = call()
            _synchronize(device)
            taken = time.perf_counter() - before
            seconds[name].append(said if isinstance(said, float) else taken)
    return seconds


def _synchronize(device: torch.device) -> None:
    if is_gpu(device):
        torch.cuda.synchronize(device)
