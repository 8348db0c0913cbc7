"""Normal numbers of family `langevin`: their error in units of the last place, and their stream."""

from __future__ import annotations

import os
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.langevin import NORMAL_ULP, box_muller, langevin_steps
from entropic_fast.ops.random_bits import streams as random

DTYPES = (torch.float32, torch.float64)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLACES = [
    *[
        pytest.param(("cpp", "cpu", isa), id=f"cpp-cpu-{isa}")
        for isa in (native.module().runnable_isas() if not native.problem else ())
    ],
    pytest.param(("triton", "cuda", None), id="triton-cuda", marks=[pytest.mark.gpu, GPU]),
]
if os.environ.get("TRITON_INTERPRET") == "1":
    PLACES.append(pytest.param(("triton", "cpu", None), id="triton-cpu"))


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    name, device, isa = request.param
    backend.set_backend(name)
    if isa is not None:
        native.use_isa(isa)
    yield str(device)
    backend.set_backend(None)
    if isa is not None:
        native.use_isa(None)


def edges() -> torch.Tensor:
    """Words around powers of two, quarter turns and where the logarithm changes its formula."""
    powers = [2**k for k in range(32)]
    near = [*powers, *(2**32 - p for p in powers), *(k * 2**29 for k in range(1, 8)), 3037000500]
    return torch.tensor(sorted({w + d for w in near for d in (-1, 0, 1) if 0 <= w + d < 2**32}))


def exact(words: torch.Tensor) -> list[mpmath.mpf]:
    """The normal numbers of pairs of words, to 40 digits, in order."""
    out = []
    with mpmath.workdps(40):
        for w0, w1 in words.tolist():
            radius = mpmath.sqrt(-2 * mpmath.log((2 * w0 + 1) / mpmath.mpf(2**33)))
            turn = (2 * w1 + 1) / mpmath.mpf(2**32)  # half turns
            out += [radius * mpmath.cospi(turn), radius * mpmath.sinpi(turn)]
    return out


def largest_error(numbers: torch.Tensor, expected: list[mpmath.mpf]) -> float:
    """In units of the last place of the exact numbers."""
    kind = np.float32 if numbers.dtype == torch.float32 else np.float64
    worst = 0.0
    with mpmath.workdps(40):
        for number, value in zip(numbers.flatten().tolist(), expected, strict=True):
            unit = mpmath.mpf(float(np.spacing(abs(kind(float(value))))))
            worst = max(worst, float(abs(number - value) / unit))
    return worst


def test_errors_are_within_the_stated_units_of_the_last_place(place: str) -> None:
    g = torch.Generator().manual_seed(0)
    edge = edges()
    mixed = edge[torch.randint(len(edge), (600, 2), generator=g)]
    words = torch.cat(
        (
            torch.randint(2**32, (1500, 2), generator=g),
            torch.stack((edge, edge.roll(1)), 1),
            torch.stack((edge.roll(7), edge), 1),
            mixed,
        )
    )
    expected = exact(words)
    for dtype in DTYPES:
        numbers = box_muller(words.to(place), dtype).cpu()
        assert largest_error(numbers, expected) <= NORMAL_ULP[dtype]


def test_the_reference_has_the_same_numbers_to_its_own_rounding() -> None:
    words = torch.randint(2**32, (1000, 2), generator=torch.Generator().manual_seed(1))
    expected = torch.tensor([float(v) for v in exact(words)], dtype=torch.float64)
    numbers = box_muller(words, torch.float64, backend="reference")
    torch.testing.assert_close(numbers.flatten(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheme", ["euler-maruyama", "baoab"])
def test_a_free_particle_shows_the_stream_of_the_public_generator(place: str, scheme: str) -> None:
    """A ridge so soft that it is flat, without walls: a step is the noise alone."""
    x = torch.zeros(21, 2, dtype=torch.float64, device=place)
    v = torch.zeros_like(x) if scheme == "baoab" else None
    langevin_steps(
        x, v, potential="ridge", parameters=(1e-300, 0.0, 1.0, 0.0), scheme=scheme,
        temperature=0.5, dt=1.0, steps=1, first_step=11, first_particle=5, seed=77,
    )  # fmt: skip
    z = random.normal((21, 2), 77, 11, start=10)
    scale = 1.0 if v is None else 0.5 * np.sqrt(0.5 * (1 - np.exp(-2)))
    torch.testing.assert_close(x.cpu(), scale * z, rtol=0, atol=1e-14)


def test_a_million_of_them_are_normal() -> None:
    x = torch.zeros(500_000, 2, dtype=torch.float32)
    langevin_steps(
        x, potential="ridge", parameters=(1e-30, 0.0, 1.0, 0.0), scheme="euler-maruyama",
        temperature=0.5, dt=1.0, steps=1, seed=3,
    )  # fmt: skip
    z = x.flatten().double().numpy()
    edges_of_bins = stats.norm.ppf(np.linspace(0, 1, 201))
    counts = np.histogram(z, edges_of_bins)[0]
    assert stats.chisquare(counts).pvalue > 1e-4
    pairs = np.corrcoef(x.double().numpy().T)[0, 1]
    assert abs(pairs) < 4 / np.sqrt(500_000)
