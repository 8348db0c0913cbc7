"""How fast this machine does each kind of work, in plain gradients and as a share of its limits.

All is in full float32 or float64, but for one line: a gradient as torch is set, on a GPU by default
with convolutions in TF32. What cannot be timed (for want of memory, say) is named with the reason;
it says nothing of what is right.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .._torch.full_precision import full_precision
from .._utils.devices import is_gpu
from ..curvature import HessianOperator, gradient_norms, score_gram
from ..dynamics import ProjectedSGD, Recording, relax
from ..objective import Objective
from ..ops._gpu_probe import describe
from ..ops.gram_update import symmetric_update_
from ..ops.norm_act_tangents import jvp
from ..ops.projected_step import project_step, segment_squares, sgd_step
from ..paths import linear_path
from ..training import models

COLUMNS = 4  # vectors of a product
ROUNDS = 7  # at most
SECONDS = 30.0  # after which no further round begins
REPLICAS = 4
CYCLE, WARM, TIMED = 5, 3, 2  # updates a cycle; cycles before the clock starts, and under it


GRADIENT, NORMS, GRAM = "plain gradient", "gradient norms", "Gram matrix"
AS_TORCH_IS_SET = "plain gradient, as torch is set"
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
        bandwidth: bytes/s of a copy, read and written; None if it was not measured.
        float32, float64: FLOP/s of a matrix product, in full precision; or None.
    """

    bandwidth: float | None = None
    float32: float | None = None
    float64: float | None = None


@dataclass(frozen=True)
class Speed:
    """Time of one kind of work.

    Attributes:
        name: the work.
        seconds: median of `rounds` interleaved rounds; per vector for products and probes. None
            if it was not measured.
        gradients: the same in plain gradients of the same images, in full float32; None for
            kernels alone.
        bandwidth: least bytes to be moved, over time, as a share of the copy bandwidth; or None.
        arithmetic: products and sums, over time, as a share of the rate of a matrix product of
            the same precision; or None. Those of products and probes are counted in a call that,
            like the timed ones, finds values of earlier ones; others are the least that the
            work needs.
        problem: why it was not measured; "" if it was.
    """

    name: str
    seconds: float | None
    rounds: int
    gradients: float | None = None
    bandwidth: float | None = None
    arithmetic: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Work:
    call: Callable[[], Any]
    share: float = 1.0  # of one call's time that is reported
    flops: float | None = None  # None: counted, where no bytes are given either
    double: bool = False  # arithmetic in float64
    bytes: float | None = None
    timed: bool = False  # it warms up and reads the clock itself, and returns seconds


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
    problems: dict[str, str] = {}
    with _noted(problems, "speeds"):
        sizes = sizes or _sizes(device)
    if sizes is None:
        return Limits(), [_not_measured(*problems.popitem())]
    groups: list[dict[str, _Work]] = []
    for name, make in (("networks", _network), ("kernels", _kernels), ("limits", _edges)):
        groups.append({})
        with _noted(problems, name):
            groups[-1] = make(device, sizes)
    network, kernels, edges = groups
    both = {**network, **kernels}
    flops: dict[str, float] = {}
    for name, work in {**both, **edges}.items():
        with _noted(problems, name):
            flops[name] = _warmed(work)
    # At least a gradient of as many images; what torch counts under vmap is not to be trusted.
    for name in {UPDATE, NORMS, GRAM} & set(flops):
        flops[name] += flops.get(GRADIENT, 0.0)
    works = {name: work for name, work in {**both, **edges}.items() if name not in problems}
    seconds = _take_turns(works, device, rounds, problems)
    limits = _limits(edges, flops, seconds)
    taken = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        _speed(name, work, taken, len(seconds[name]), limits, flops[name], name in network)
        for name, work in both.items()
        if name in taken
    ]
    return limits, rows + [_not_measured(*problem) for problem in problems.items()]


def _speed(
    name: str,
    work: _Work,
    taken: dict[str, float],
    rounds: int,
    limits: Limits,
    flops: float,
    of_network: bool,
) -> Speed:
    seconds = taken[name] * work.share
    rate = limits.float64 if work.double else limits.float32
    bandwidth = None
    if work.bytes and limits.bandwidth:
        bandwidth = work.bytes / taken[name] / limits.bandwidth
    return Speed(
        name,
        seconds,
        rounds,
        seconds / taken[GRADIENT] if of_network and GRADIENT in taken else None,
        bandwidth,
        flops / taken[name] / rate if flops and rate else None,
    )


def _limits(
    edges: dict[str, _Work], flops: dict[str, float], seconds: dict[str, list[float]]
) -> Limits:
    best = {
        name: (work.bytes or flops[name]) / min(seconds[name])
        for name, work in edges.items()
        if name in seconds
    }
    return Limits(best.get("copy"), best.get("float32"), best.get("float64"))


def _not_measured(name: str, problem: str) -> Speed:
    return Speed(name, None, 0, problem=problem)


@contextlib.contextmanager
def _noted(problems: dict[str, str], name: str) -> Iterator[None]:
    """Note why a speed cannot be measured, and go on with the others."""
    try:
        yield
    except Exception as error:  # whatever is raised is the reason
        problems.setdefault(name, describe(error))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def _sizes(device: torch.device) -> Sizes:
    if not is_gpu(device):
        return CPU
    return GPU if torch.cuda.mem_get_info(device)[0] > ROOMY else SMALL_GPU


def _network(device: torch.device, sizes: Sizes) -> dict[str, _Work]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sizes.images, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (sizes.images,), generator=generator)
    model = models.initialize(models.build(sizes.model), 0).eval()
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
            obj,
            path,
            0.5,
            ProjectedSGD(1e-3, batch, project_every=CYCLE, steps=CYCLE * (WARM + TIMED)),
            replicas=REPLICAS,
            recording=Recording(callback=record),
        )
        return (clock[-1] - clock[-1 - TIMED]) / (CYCLE * TIMED)

    # TF32's rate is not that of the products which are the limit.
    in_tf32 = {AS_TORCH_IS_SET: _Work(gradient, flops=0.0)} if is_gpu(device) else {}
    return {
        GRADIENT: _Work(full_precision()(gradient)),
        **in_tf32,
        "Hessian product, a column": _Work(lambda: hessian @ vectors, 1 / COLUMNS),
        "trace probe": _Work(lambda: hessian.quadratic_forms(vectors), 1 / COLUMNS),
        NORMS: _Work(lambda: gradient_norms(obj), flops=0.0),
        GRAM: _Work(lambda: score_gram(obj), flops=len(x) * (len(x) + 1.0) * obj.num_params),
        UPDATE: _Work(update, flops=0.0, timed=True),
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
        "kernel: norm_act_tangents": _Work(
            lambda: jvp(u, normal=normal, scale=scale, slope=slope, out=out),
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
        "float32": _Work(full_precision()(lambda: a @ a), flops=2 * len(a) ** 3),
        "float64": _Work(lambda: b @ b, flops=2 * len(b) ** 3),
    }


def _warmed(work: _Work) -> float:
    """Products and sums of one call like those that are timed, after the calls that come before.

    Counted are those of a network's convolutions and matrix products. Of curvature's calls the
    first computes values at the point, the second keeps them, and the third is counted: from the
    fourth on a GPU replays CUDA graphs, in which nothing is seen.
    """
    work.call()
    if work.flops is not None or work.bytes is not None:
        return work.flops or 0.0
    work.call()
    with FlopCounterMode(display=False) as counter:
        work.call()
    return float(counter.get_total_flops())


def _take_turns(
    works: dict[str, _Work], device: torch.device, rounds: int, problems: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds of each, one a round, or what it says itself; without those that fail.

    Each is called once just before it is timed: captures of CUDA graphs in what ran before have
    torch give its free memory back to the driver.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > SECONDS:
            break
        for name, work in works.items():
            if name in problems:
                continue
            with _noted(problems, name):
                seconds[name].append(_timed(work, device))
    return {name: found for name, found in seconds.items() if name not in problems}


def _timed(work: _Work, device: torch.device) -> float:
    if work.timed:
        return float(work.call())
    work.call()
    _synchronize(device)
    before = time.perf_counter()
    work.call()
    _synchronize(device)
    return time.perf_counter() - before


def _synchronize(device: torch.device) -> None:
    if is_gpu(device):
        torch.cuda.synchronize(device)
