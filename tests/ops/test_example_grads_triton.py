"""Score families in Triton: under the interpreter, compiled ahead of time, and on a GPU.

The families' own tests run every case on a GPU where there is one. Here most of them run under the
interpreter too, in a process of its own, with what concerns these kernels alone: how launches
split the work, repeatability, and the precision of float32 products.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import relative_norm
from torch import Tensor
from triton_launches import SCORES, compile_launch, launches_of

from entropic_fast._torch.matmul_precision import matmul_precision, set_matmul_precision
from entropic_fast.ops import backend
from entropic_fast.ops.conv_example_grads import conv_weight_grads, conv_weight_norms
from entropic_fast.ops.gram_update import cross_update_, symmetric_update_
from entropic_fast.ops.norm_example_grads import affine_grads, batch_norm_backward

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_GPU = [pytest.mark.gpu, GPU]
PLACES = [pytest.param("cuda", id="triton-cuda", marks=ON_GPU)]
if INTERPRETED:
    PLACES.append(pytest.param("cpu", id="triton-cpu"))

SUITES = (
    "test_conv_example_grads.py",
    "test_gram_update.py",
    "test_norm_example_grads.py",
    "test_example_grads_triton.py",
)
# What takes the interpreter seconds; each has a quicker relative that stays.
SLOW = (
    "65536", "(many_positions and 70)", "large_images", "opcheck", "5x5", "7x7", "expanded",
    "first_memory", "(slices_are_read and not 1d)", "(bad_value and not 3x3)",
    "((depthwise or grouped or 3d or dilated) and dtype0)", "((wide or uneven) and dtype1)",
)  # fmt: skip
PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]

SIZES: dict[str, Any] = {
    "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings_are_restored() -> Iterator[None]:
    yield
    backend.set_backend(None)
    set_matmul_precision("float32")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    backend.set_backend("triton")
    return str(request.param)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_agrees_with_the_oracles_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    here = Path(__file__)
    selected = f"triton and cpu and not ({' or '.join(SLOW)})"
    suites = [str(here.with_name(suite)) for suite in SUITES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *suites, "-q", "-k", selected, *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 350, run.stdout
    assert "skipped" not in run.stdout, run.stdout


# ---- compiled ahead of time ----------------------------------------------------------------------


REDUCED = [(name, p) for name in ("conv", "gram") for p in ("tf32x3", "tf32")]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize(("work", "precision"), [*((w, "float32") for w in SCORES), *REDUCED])
def test_what_is_launched_compiles_ahead_of_time(work: str, precision: str) -> None:
    """Kernels, types and constants exactly as the host functions launch them on real shapes."""
    launches = launches_of(SCORES[work], precision)
    assert len(launches) >= 2
    for launch in launches:
        for arch in (80, 90) if work in ("conv", "conv-depthwise", "gram", "norm") else (90,):
            compiled = compile_launch(*launch, arch)
            assert f"sm_{arch}" in compiled.asm["ptx"]
            assert len(compiled.asm["cubin"]) > 0
            if launch[0].__name__ in ("tile_kernel", "gram_kernel"):
                tensor_cores = ".tf32" in compiled.asm["ptx"]
                assert tensor_cores == (precision != "float32")


# ---- how launches split the work -----------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns"), [(3, 5000), (70, 1500)])
@pytest.mark.parametrize("double", [False, True], ids=["float32", "in-double"])
def test_columns_split_among_programs_add_up(
    place: str, double: bool, count: int, columns: int
) -> None:
    rows = randn(count, columns, device=place)
    start = randn(count, count, seed=1, dtype=torch.float64, device=place)
    gram, out = start.clone(), start.clone()
    symmetric_update_(gram, rows, double_products=double)
    cross_update_(out, rows, rows.clone(), double_products=double)
    exact = rows.double() @ rows.double().T
    limit = 1e-14 if double else 1e-7
    assert relative_norm(out - start, exact) <= limit
    assert relative_norm((gram - start).tril(), exact.tril()) <= limit
    assert torch.equal(gram.triu(1), start.triu(1))


def test_tiles_in_groups_cover_the_matrix_once(place: str) -> None:
    """From 16 tiles on they are numbered in squares of 8 x 8, some of them past the end."""
    m, n = 1030, 1025
    a = randn(m, 3, dtype=torch.float64, device=place)
    gram = torch.zeros(m, m, dtype=torch.float64, device=place)
    symmetric_update_(gram, a)
    torch.testing.assert_close(gram, (a @ a.T).tril(), rtol=1e-14, atol=1e-14)
    out = torch.zeros(m, n, dtype=torch.float64, device=place)
    cross_update_(out, a, a[:n])
    torch.testing.assert_close(out, a @ a[:n].T, rtol=1e-14, atol=1e-14)


def test_pixels_unevenly_spaced_are_copied_first(place: str) -> None:
    wide = randn(2, 9, 8, 5, dtype=torch.float64, device=place)
    a, g = wide[:, 1:7, 2:7], wide[:, 2:8, :5]
    expected = conv_weight_grads(a.contiguous(), g.contiguous(), **SIZES)
    assert torch.equal(conv_weight_grads(a, g, **SIZES), expected)


@pytest.mark.parametrize("groups", [1, 4], ids=["tiles", "columns"])
@pytest.mark.parametrize("padding", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_dimension_of_one_pixel_that_no_position_reads_gives_zeros(
    place: str, padding: tuple[int, int, int], groups: int
) -> None:
    a, g = (randn(2, 1, 1, 1, 8, seed=s, device=place) for s in (1, 2))
    one = [1, 1, 1]
    grads = conv_weight_grads(a, g, one, stride=one, padding=padding, dilation=one, groups=groups)
    assert torch.equal(grads, torch.zeros_like(grads))


@pytest.mark.parametrize("groups", [1, 12], ids=["tiles", "columns"])
def test_more_positions_than_one_float32_sum_takes(place: str, groups: int) -> None:
    a, g = (randn(1, 1500, 12, seed=s, device=place) for s in (1, 2))
    sizes: dict[str, Any] = {"kernel": [2], "stride": [1], "padding": [1], "dilation": [1]}
    grads = conv_weight_grads(a, g, **sizes, groups=groups)
    exact = conv_weight_grads(a.double(), g.double(), **sizes, groups=groups)
    assert relative_norm(grads, exact) <= 1e-6
    norms = conv_weight_norms(a, g, **sizes, groups=groups)
    assert relative_norm(norms, exact.square().sum(1)) <= 1e-6


def test_repeated_calls_give_the_same_bits(place: str) -> None:
    def work() -> list[Tensor]:
        a, g = (randn(2, 4, 4, 8, seed=s, device=place) for s in (1, 2))
        rows = randn(40, 3000, device=place)
        gram = torch.zeros(40, 40, dtype=torch.float64, device=place)
        symmetric_update_(gram, rows)
        x, y = a.flatten(1, 2), g.flatten(1, 2)
        one = torch.ones(8, device=place)
        results = [gram, conv_weight_grads(a, g, **SIZES), conv_weight_norms(a, g, **SIZES)]
        results += batch_norm_backward(x, y, one, one, one)
        return [*results, *affine_grads(x, y, one[None, None], one[None, None])]

    first = work()
    repeats = 1 if place == "cpu" else 20
    for _ in range(repeats):
        assert all(map(torch.equal, first, work()))


# ---- precision -----------------------------------------------------------------------------------


def test_the_precision_is_full_float32_unless_another_is_asked_for() -> None:
    assert matmul_precision() == "float32"
    set_matmul_precision("tf32x3")
    assert matmul_precision() == "tf32x3"
    with pytest.raises(ValueError, match="name: expected one of float32, tf32x3, tf32"):
        set_matmul_precision("tf31")
    assert matmul_precision() == "tf32x3"


# Relative errors of products: what each setting promises, and a little more than it can reach.
LIMITS = {"float32": (0.0, 3e-7), "tf32x3": (0.0, 1e-5), "tf32": (2e-5, 2e-3)}


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", LIMITS)
def test_products_on_a_gpu_are_as_precise_as_asked(precision: str) -> None:
    backend.set_backend("triton")
    set_matmul_precision(precision)
    low, high = LIMITS[precision]
    rows = randn(200, 4096, device="cuda")
    gram = torch.zeros(200, 200, dtype=torch.float64, device="cuda")
    symmetric_update_(gram, rows)
    exact = (rows.double() @ rows.double().T).tril()
    assert low <= relative_norm(gram.tril(-1), exact.tril(-1)) <= 30 * high  # canceling sums
    assert relative_norm(gram.diagonal(), exact.diagonal()) <= high
    a, g = (randn(4, 16, 16, 64, seed=s, device="cuda") for s in (1, 2))
    grads = conv_weight_grads(a, g, **SIZES)
    doubles = conv_weight_grads(a.double(), g.double(), **SIZES)
    assert low <= relative_norm(grads, doubles) <= high * 4


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_float64_is_never_reduced_on_a_gpu(precision: str) -> None:
    backend.set_backend("triton")
    set_matmul_precision(precision)
    rows = randn(70, 3000, dtype=torch.float64, device="cuda")
    for double in (False, True):
        gram = torch.zeros(70, 70, dtype=torch.float64, device="cuda")
        symmetric_update_(gram, rows.float() if double else rows, double_products=double)
        exact = rows.float().double() if double else rows
        assert relative_norm(gram, (exact @ exact.T).tril()) <= 1e-14


# ---- offsets beyond 2^31 elements ----------------------------------------------------------------


@pytest.mark.gpu
@GPU
def test_elements_beyond_2_to_the_31_are_reached_on_a_gpu() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GB")
    backend.set_backend("triton")
    far = 2**31 + 2**20
    memory = torch.zeros(far, device="cuda")
    size = 4 * 6 * 6 * 16

    # Two rows (examples), the second beyond element 2^31 - 1.
    def far_apart(values: Tensor) -> Tensor:
        apart = memory.as_strided(values.shape, (2**31, *values.stride()[1:]))
        return apart.copy_(values)

    rows = randn(2, size, device="cuda")
    gram, expected = torch.zeros(2, 2, 2, dtype=torch.float64, device="cuda")
    symmetric_update_(expected, rows)
    symmetric_update_(gram, far_apart(rows))
    assert relative_norm(gram, expected) <= 1e-7
    a, g = (randn(2, 6, 6, 16, seed=s, device="cuda") for s in (1, 2))
    grads, norms = conv_weight_grads(a, g, **SIZES), conv_weight_norms(a, g, **SIZES)
    assert relative_norm(conv_weight_norms(far_apart(a), g, **SIZES), norms) <= 1e-6
    assert relative_norm(conv_weight_norms(a, far_apart(g), **SIZES), norms) <= 1e-6
    out = memory.as_strided(grads.shape, (2**31, 1))
    assert relative_norm(conv_weight_grads(a, g, **SIZES, out=out), grads) <= 1e-6
    # Positions of one example that reach beyond it.
    x = memory.zero_()[: 2**31 + 2**10].view(1, -1, 2**9)
    x[:, -3:] = 1.0
    one = torch.ones(1, 1, 1, device="cuda")
    for total in affine_grads(x, x, 0 * one, one):
        assert bool((total == 3).all())
