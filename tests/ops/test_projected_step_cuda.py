"""The CUDA C++ of family `projected_step` without a GPU, in many orders of threads.

The family's own tests (test_projected_step.py) take it as one more backend. Here every result is
compared with the CPU kernels', which share csrc/kernels/projected_step.h: updates, segments,
positions and points to the bit, all products and distances to rounding.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import emulated_cuda
import pytest
import torch
from emulated_cuda import Fault
from torch import Tensor

from entropic_fast.ops.projected_step import native as step_native
from entropic_fast.ops.projected_step import segment_squares
from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())
)

DTYPES = [torch.float32, torch.float64]
SEEDS = range(1, 5)
RANDOM_BITS = Path(__file__).with_name("test_random_bits.py")
# Momentum, dampening, weight decay, Nesterov, first step.
SGD: dict[str, tuple[float, float, float, bool, bool]] = {
    "plain": (0.0, 0.0, 5e-4, False, False),
    "first": (0.9, 0.0, 0.0, False, True),
    "first-nesterov": (0.9, 0.0, 5e-4, True, True),
    "momentum": (0.9, 0.1, 5e-4, False, False),
    "nesterov": (0.9, 0.0, 5e-4, True, False),
}
# beta1, beta2, eps, weight decay, decoupled.
ADAM: dict[str, tuple[float, float, float, float, bool]] = {
    "adam": (0.9, 0.999, 1e-8, 5e-4, False),
    "adamw": (0.9, 0.999, 1e-8, 5e-4, True),
}
# Replicas, parameters, pivots: around a block of 2,048 parameters, a tile of 32 pivots and a warp.
SHAPES = [(1, 1, 2), (3, 2047, 4), (1, 2048, 32), (2, 2049, 33), (2, 5, 65), (2, 4097, 2)]


@dataclass
class Case:
    """An update and a projection, and what is wrong with them on the emulated kernels."""

    theta: Tensor  # [R, P]
    pivots: Tensor  # [M, P]
    optimizer: str = "momentum"

    def differences(self) -> list[str]:
        """What differs from the CPU kernels, by name. A projection is that of equal products."""
        ours, theirs = (self.updated(module) for module in (emulated_cuda, step_native))
        found = [n for n in ("theta", "first", "second") if not same(ours[n], theirs[n])]
        squares = segment_squares(self.pivots)
        if self.products_off_by(ours["products"], theirs["products"], squares) > 1e-13:
            found.append("products")
        projected = []
        for module in (emulated_cuda, step_native):
            theta, products = theirs["theta"].clone(), theirs["products"].clone()
            result = module.project_step(ProjectStep(theta, products, self.pivots, squares))
            projected.append(dict(zip(("segment", "t", "distance"), result, strict=True)))
            projected[-1]["point"] = theta
        a, b = projected
        found += [n for n in ("segment", "t", "point") if not same(a[n], b[n])]
        if not torch.allclose(a["distance"], b["distance"], 1e-13, 0, equal_nan=True):
            found.append("distance")
        return found

    def updated(self, functions: ModuleType) -> dict[str, Tensor]:
        replicas = len(self.theta)
        generator = torch.Generator().manual_seed(1)
        grad, first, second = torch.randn(3, *self.theta.shape, generator=generator).to(self.theta)
        second, theta = second.square(), self.theta.clone()
        lr = 0.02 * torch.arange(1, replicas + 1, dtype=torch.float64)  # another for each replica
        if self.optimizer in SGD:
            settings = SGD[self.optimizer]
            products = functions.sgd_step(SgdStep(theta, grad, first, lr, self.pivots, *settings))
        else:
            state = grad, first, second, torch.arange(3, 3 + replicas), lr
            arguments = AdamStep(theta, *state, self.pivots, *ADAM[self.optimizer])
            products = functions.adam_step(arguments)
        return {"theta": theta, "first": first, "second": second, "products": products}

    def products_off_by(self, ours: Tensor, theirs: Tensor, segment_squares: Tensor) -> float:
        """The largest difference, in units of |theta - p|^2 and of |theta - p| |p' - p|."""
        square, along = theirs[:, 0], theirs[:, 1]
        if not torch.equal(ours.isnan(), theirs.isnan()) or ours[:, 1, -1].nan_to_num().any():
            return float("inf")
        scale = (square[:, :-1] * segment_squares).sqrt()
        errors = (
            ((ours[:, 0] - square) / square).abs(),
            ((ours[:, 1, :-1] - along[:, :-1]) / scale).abs(),
        )
        return max(error.nan_to_num(0.0).max().item() for error in errors)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def case(
    replicas: int, size: int, count: int, dtype: torch.dtype, optimizer: str = "momentum"
) -> Case:
    """Replicas beside the middles of segments, another for each."""
    generator = torch.Generator().manual_seed(size + count)
    pivots = torch.randn(count, size, generator=generator, dtype=torch.float64)
    at = 3 * torch.arange(replicas)
    theta = 0.5 * (pivots[(at + 1) % count] + pivots[(at + 2) % count])
    theta += 0.05 * torch.randn(replicas, size, generator=generator, dtype=torch.float64)
    return Case(theta.to(dtype), pivots.to(dtype), optimizer)


def with_nan(dtype: torch.dtype, in_path: bool) -> Case:
    found = case(2, 3000, 3, dtype, "plain")
    (found.pivots[2] if in_path else found.theta[0])[2999] = torch.nan
    return found


def tied(dtype: torch.dtype) -> Case:
    """Every segment of a zigzag is nearest at the pivot that it shares."""
    pivots = (torch.arange(70) % 2).to(dtype)[:, None]
    return Case(torch.full((2, 1), 7, dtype=dtype), pivots)


@pytest.fixture(autouse=True)
def order_is_restored() -> Iterator[None]:
    yield
    emulated_cuda.library().order(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float", "double"])
@pytest.mark.parametrize("optimizer", [*SGD, *ADAM])
def test_results_are_those_of_the_cpu_in_any_order(optimizer: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        emulated_cuda.library().order(seed)
        assert case(*shape, dtype, optimizer).differences() == [], shape


@pytest.mark.parametrize("seed", [0, *SEEDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float", "double"])
def test_special_points_and_paths(dtype: torch.dtype, seed: int) -> None:
    emulated_cuda.library().order(seed)
    for special in (with_nan(dtype, False), with_nan(dtype, True), tied(dtype)):
        assert special.differences() == []
    assert case(2, 2049, 33, dtype).differences() == []


@pytest.mark.skipif(emulated_cuda.SANITIZED, reason="instrumented stacks are too slow for it")
def test_sums_over_more_blocks_than_a_block_has_threads() -> None:
    emulated_cuda.library().order(1)
    assert case(1, 2048 * 256 + 1, 2, torch.float32).differences() == []


# ---- faults --------------------------------------------------------------------------------------

SHUFFLE = "__shfl_down_sync(0xffffffffu, {}, offset)"
FAULTS = [
    Fault(
        "no barrier before the coefficients are read",
        "__syncthreads();\n  const typename Rule::Coefficients c",
        "__syncthreads();",
        "",
    ),
    Fault(
        "no barrier before sums of warps are added",
        "__syncthreads();\n    if (int(threadIdx.x) < 2 * count)",
        "__syncthreads();",
        "",
    ),
    Fault(
        "no barrier before the next tile overwrites the sums",
        "= total;\n    }\n    __syncthreads();",
        "__syncthreads();",
        "",
    ),
    Fault(
        "no barrier in the sum over a block",
        "__syncthreads();\n  double total = 0.0;",
        "__syncthreads();",
        "",
    ),
    Fault(
        "a barrier in a branch",
        "__syncthreads();\n    if (int(threadIdx.x) < 2 * count)",
        "__syncthreads();",
        "if (threadIdx.x < 128) __syncthreads();",
    ),
    Fault(
        "a shuffle in a branch",
        "square = warp_sum(square);",
        "square = warp_sum(square);",
        "if (threadIdx.x % 32 < 16) square = warp_sum(square);",
    ),
    Fault(
        "shuffles that begin at 8",
        "offset = 16; offset > 0; offset /= 2)\n    value",
        "16",
        "8",
    ),
    Fault(
        "a shuffle in float",
        "value += __shfl_down_sync(0xffffffffu, value, offset);",
        "value += __shfl_down_sync(0xffffffffu, value, offset);",
        "value += __shfl_down_sync(0xffffffffu, float(value), offset);",
    ),
    Fault(
        "a position that is not passed on",
        SHUFFLE.format("best_t"),
        SHUFFLE.format("best_t"),
        "best_t",
    ),
    Fault(
        "a NaN that is not passed on",
        f"poison += {SHUFFLE.format('poison')};",
        f"poison += {SHUFFLE.format('poison')};",
        "",
    ),
    Fault(
        "ties go to the highest segment",
        "other == best && other_m < best_m",
        "other_m < best_m",
        "other_m > best_m",
    ),
    Fault(
        "the tile's offset is forgotten",
        "which * pivot_count + tile + i",
        "tile",
        "i64(0)",
    ),
    Fault(
        "no bound on loads of the first pivot",
        "j < size ? pivots[j] : T(0)",
        "j < size ? pivots[j] : T(0)",
        "pivots[j]",
    ),
    Fault(
        "the last block's sum is left out",
        "i < count; i += THREADS) value += partial[row * count + i];",
        "i < count",
        "i < count - 1",
    ),
    Fault(
        "a grid of no blocks",
        "update_and_products<T, Rule><<<grid_size(s.replicas * block_count)",
        "grid_size(s.replicas * block_count)",
        "0u",
    ),
    Fault("the first replica's learning rate", "rule.coefficients(r)", "(r)", "(i64(0))"),
    Fault("the first replica's segment", "pivots + segment[r]", "segment[r]", "segment[0]"),
    Fault(
        "points that are not stored",
        "theta[r * size + j] = T(point);",
        "theta[r * size + j] = T(point);",
        "",
    ),
    Fault(
        "momentum that is not stored",
        "if (KIND != SGD_PLAIN) buffer[at] = s.velocity;",
        "if (KIND != SGD_PLAIN) buffer[at] = s.velocity;",
        "",
    ),
]  # fmt: skip
# Reads beyond the path, which change no result.
BEYOND = Fault(
    "the pivot after the last is read",
    "!last && j < size ? pivots",
    "!last && j < size",
    "j < size",
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> emulated_cuda.Library:
    folder = tmp_path_factory.mktemp("faults")
    return emulated_cuda.Library(
        emulated_cuda.build(folder, [*FAULTS, BEYOND], "projected_step.cu")
    )


def caught(faulty: emulated_cuda.Library, number: int, seeds: range) -> bool:
    """Whether any case differs, or any launch fails, with this fault in effect."""
    shapes = [(3, 2047, 4), (2, 2049, 33)]
    cases = [*(case(*s, torch.float64) for s in shapes), tied(torch.float64)]
    cases += [with_nan(torch.float64, in_path) for in_path in (False, True)]
    faulty.plant(number)
    try:
        with emulated_cuda.used(faulty):
            for seed in seeds:
                faulty.order(seed)
                if any(c.differences() for c in cases):
                    return True
    except RuntimeError as error:
        assert re.search("barrier|shuffle|update_and_products: invalid config", str(error))
        return True
    finally:
        faulty.plant(0)
    return False


def test_nothing_is_caught_without_a_fault(faulty: emulated_cuda.Library) -> None:
    assert not caught(faulty, 0, SEEDS)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=[f.name for f in FAULTS])
def test_planted_faults_are_caught(faulty: emulated_cuda.Library, number: int) -> None:
    assert caught(faulty, number, SEEDS)


def test_divergence_is_named(faulty: emulated_cuda.Library) -> None:
    names = [fault.name for fault in FAULTS]
    said = {
        "a barrier in a branch": "threads wait at different barriers, of lines",
        "a shuffle in a branch": "a shuffle that some lanes of its mask have left",
    }
    for name, words in said.items():
        faulty.plant(names.index(name) + 1)
        with emulated_cuda.used(faulty), pytest.raises(RuntimeError, match=words):
            case(1, 2048, 2, torch.float64).differences()
    faulty.plant(0)


# ---- sanitizers ----------------------------------------------------------------------------------


def sanitized(selected: str) -> subprocess.CompletedProcess[str]:
    """Tests of this file and of random numbers in a process that loads AddressSanitizer first."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", __file__, str(RANDOM_BITS), "-q", "-k", selected,
         "--capture=sys",
         "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"],
        env={
            **os.environ,
            "READ_BEYOND_THE_PATH": "1",
            "LD_PRELOAD": ":".join(found.stdout.strip() for found in libraries),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python's are not ours
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.slow  # minutes: torch's own start, compilation, instrumented stacks
@pytest.mark.timeout(900)
@pytest.mark.skipif(emulated_cuda.SANITIZED, reason="this is the sanitizers' process")
def test_sanitizers_find_nothing() -> None:
    run = sanitized(
        "in_any_order and (nesterov or adamw) or special_points or without_a_fault"
        " or cuda-emulated and (beside_its_numbers or philox_at_any)"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) == 23, run.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(emulated_cuda.SANITIZED, reason="this is the sanitizers' process")
def test_sanitizers_find_a_read_beyond_the_path() -> None:
    run = sanitized("a_read_beyond_the_path_ends_the_process")
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr and "projected_step.cu" in run.stderr, run.stderr


@pytest.mark.skipif("READ_BEYOND_THE_PATH" not in os.environ, reason="it ends the process")
def test_a_read_beyond_the_path_ends_the_process(faulty: emulated_cuda.Library) -> None:
    faulty.plant(len(FAULTS) + 1)
    with emulated_cuda.used(faulty):
        case(1, 2049, 2, torch.float64).updated(emulated_cuda)
