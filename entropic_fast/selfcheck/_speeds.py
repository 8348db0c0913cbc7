"""Speed of each kind of work on this machine, in plain gradients and as a share of its limits.

All is in full float32 or float64, except one line: a gradient as torch is set, on a GPU by default
with convolutions in TF32. Work that cannot be timed (out of memory, say) is named with the reason.
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
    """Sizes of the timed work: about a second per round on two cores, and on a large GPU."""

    model: str
    images: int  # of 3 x 32 x 32
    copied: int  # bytes
    matrix: int  # rows and columns
    rows: int  # of the Gram kernel, with `columns`
    columns: int
    parameters: int  # of each replica of the step
    pixels: int  # of the normalization's tangents, of 64 channels


ROOMY = 32 * 2**30  # bytes free on a GPU that is timed at large sizes
CPU = Sizes("resnet20", 16, 2**26, 1024, 128, 16384, 250_000, 8192)
SMALL_GPU = Sizes("resnet20", 64, 2**28, 4096, 512, 65536, 1_000_000, 65536)
GPU = Sizes("resnet20", 512, 2**30, 8192, 1024, 262_144, 4_000_000, 262_144)


@dataclass(frozen=True)
class Limits:
    """The highest rates of the machine over all rounds; None if not measured."""

    bandwidth: float | None = None  # bytes per second of a copy, read and written
    float32: float | None = None  # FLOP/s of a matrix product in full precision
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
        bandwidth: necessary bytes over time, as a share of the copy bandwidth; or None.
        arithmetic: operations over time, as a share of the rate of a matrix product of the same
            precision; or None. Counted in a call with cached values for products and probes;
            otherwise the least that the work needs.
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
    """Time every kind of work on a device in interleaved rounds, by default at its sizes.

    There are fewer than `rounds` if they take longer than 30 s.
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
    # At least a gradient of as many images; torch does not count reliably under vmap.
    for name in {UPDATE, NORMS, GRAM} & set(flops):
        flops[name] += flops.get(GRADIENT, 0.0)
    works = {name: work for name, work in {**both, **edges}.items() if name not in problems}
    seconds = _take_turns(works, device, rounds, problems)
    limits = _limits(edges, flops, seconds)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        Speed(
            name,
            median * work.share,
            len(seconds[name]),
            median * work.share / medians[GRADIENT]
            if name in network and GRADIENT in medians
            else None,
            *_shares(work, median, flops[name], limits),
        )
        for name, work in both.items()
        if (median := medians.get(name)) is not None
    ]
    return limits, rows + [_not_measured(*problem) for problem in problems.items()]


def _shares(
    work: _Work, seconds: float, flops: float, limits: Limits
) -> tuple[float | None, float | None]:
    """The shares of the copy bandwidth and of the rate of matrix products."""
    rate = limits.float64 if work.double else limits.float32
    return (
        work.bytes / seconds / limits.bandwidth if work.bytes and limits.bandwidth else None,
        flops / seconds / rate if flops and rate else None,
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
    """Note why a speed cannot be measured, and continue with the others."""
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
        """Seconds of an update in warm cycles, on a GPU with CUDA graphs."""
        clock: list[float] = []

        def record(_: Any) -> None:
            _synchronize(device)
            clock.append(time.perf_counter())

        sgd = ProjectedSGD(1e-3, batch, project_every=CYCLE, steps=CYCLE * (WARM + TIMED))
        relax(obj, path, 0.5, sgd, replicas=REPLICAS, recording=Recording(callback=record))
        return (clock[-1] - clock[-1 - TIMED]) / (CYCLE * TIMED)

    # The limit of products is not measured in TF32.
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
    """The machine's limits, timed in turns with the rest so that its load affects all alike."""
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
    """Operations in the convolutions and matrix products of one warm call.

    The first Hessian product computes values at the point, the second caches them, and the third
    is counted. From the fourth on a GPU replays CUDA graphs, whose operations are not counted.
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
    """Seconds of each in every round, or those that it returns; without those that fail."""
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
    work.call()  # captures of CUDA graphs return torch's free memory to the driver
    _synchronize(device)
    before = time.perf_counter()
    work.call()
    _synchronize(device)
    return time.perf_counter() - before


def _synchronize(device: torch.device) -> None:
    if is_gpu(device):
        torch.cuda.synchronize(device)
