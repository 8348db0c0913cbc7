"""Family `langevin`: every backend that can run here against the reference, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from langevin_kernel_cases import (
    DTYPES,
    POTENTIALS,
    advanced,
    assert_same_steps,
    kinds,
    start,
)

from entropic_fast.ops import backend
from entropic_fast.ops.langevin import langevin_steps
from entropic_fast.ops.langevin.reference import SCHEMES

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLACES = [
    pytest.param(("cpp", "cpu"), id="cpp-cpu"),
    *[
        pytest.param((name, "cuda"), id=f"{name}-cuda", marks=[pytest.mark.gpu, GPU])
        for name in ("reference", "triton")
    ],
]
if os.environ.get("TRITON_INTERPRET") == "1":
    PLACES.append(pytest.param(("triton", "cpu"), id="triton-cpu"))


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device, with one backend forced on it."""
    name, device = request.param
    backend.set_backend(name)
    yield str(device)
    backend.set_backend(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_steps_are_those_of_the_reference(
    place: str, potential: str, scheme: str, dtype: torch.dtype
) -> None:
    for particles, first, steps in ((37, 0, 5), (300, 1, 3), (1, 4, 5), (2, 7, 1)):
        x, v = start(particles, 2, scheme, dtype, seed=particles)
        options = {"steps": steps, "first_particle": first, "first_step": 3}
        expected = advanced(x, v, potential, scheme, backend="reference", **options)
        there = x.to(place), None if v is None else v.to(place)
        assert_same_steps(advanced(*there, potential, scheme, **options), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("potential", ["ridge", "channel"])
def test_steps_in_more_dimensions_are_those_of_the_reference(
    place: str, potential: str, scheme: str
) -> None:
    for dim, dtype in ((3, torch.float64), (4, torch.float32), (16, torch.float64)):
        x, v = start(45, dim, scheme, dtype, seed=dim)
        x[:, :-1] -= 0.7
        options = {"steps": 3, "first_particle": 3, "first_step": 1}
        expected = advanced(x, v, potential, scheme, backend="reference", **options)
        there = x.to(place), None if v is None else v.to(place)
        assert_same_steps(advanced(*there, potential, scheme, **options), expected)
        tail = x[7:].to(place), None if v is None else v[7:].to(place)
        cut = advanced(*tail, potential, scheme, **{**options, "first_particle": 10})
        assert torch.equal(cut, advanced(*there, potential, scheme, **options)[7:])


@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_without_noise_too(place: str, potential: str, scheme: str) -> None:
    x, v = start(20, 2, scheme, torch.float64)
    expected = advanced(x, v, potential, scheme, backend="reference", temperature=0.0)
    there = x.to(place), None if v is None else v.to(place)
    assert_same_steps(advanced(*there, potential, scheme, temperature=0.0), expected)


@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_a_run_may_be_cut_anywhere(place: str, potential: str, scheme: str) -> None:
    """In steps and in particles: the same bits."""
    x, v = start(23, 2, scheme, torch.float32, place)
    whole = advanced(x, v, potential, scheme, steps=7)
    halves = advanced(x, v, potential, scheme, steps=4)
    x2, v2 = halves[:, :2].contiguous(), None if v is None else halves[:, 2:].contiguous()
    assert torch.equal(advanced(x2, v2, potential, scheme, steps=3, first_step=4), whole)
    pieces = [
        advanced(
            x[a:b], None if v is None else v[a:b], potential, scheme, steps=7, first_particle=a
        )
        for a, b in ((0, 5), (5, 6), (6, 23))
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_seeds_and_counters_use_all_their_bits(place: str) -> None:
    x, _ = start(3, 2, "euler-maruyama", torch.float64, place)
    seen = []
    for big in ({}, {"seed": 2**40 + 5}, {"first_step": 2**33}, {"first_particle": 2**34}):
        seen.append(advanced(x, None, "ring", "euler-maruyama", steps=1, **big))
        expected = advanced(
            x.cpu(), None, "ring", "euler-maruyama", steps=1, backend="reference", **big
        )
        assert_same_steps(seen[-1], expected)
    for other in seen[1:]:
        assert not torch.allclose(other, seen[0])


def test_no_particles_and_no_steps_change_nothing(place: str) -> None:
    for scheme in SCHEMES:
        x, v = start(0, 2, scheme, torch.float64, place)
        assert advanced(x, v, "ring", scheme).numel() == 0
        x, v = start(4, 2, scheme, torch.float64, place)
        assert torch.equal(advanced(x, v, "ring", scheme, steps=0)[:, :2], x)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_what_diverges_is_not_finite_at_the_end(place: str, potential: str) -> None:
    """A step too long; nothing returns to numbers that look right."""
    x = torch.tensor([[0.7, 0.6], [3.0, 0.4]], dtype=torch.float64, device=place)
    for scheme in SCHEMES:
        v = torch.zeros_like(x) if scheme == "baoab" else None
        end = advanced(x, v, potential, scheme, dt=50.0, steps=400, temperature=0.5)
        assert not torch.isfinite(end).all(1).any()


def test_the_ring_s_center_has_no_force(place: str) -> None:
    x = torch.zeros(3, 2, dtype=torch.float64, device=place)
    assert torch.equal(advanced(x, None, "ring", "euler-maruyama", temperature=0.0), x)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_opcheck(place: str, potential: str) -> None:
    from torch.library import opcheck

    for scheme in SCHEMES:
        x, v = start(5, 2, scheme, torch.float64, place)
        opcheck(
            torch.ops.entropic_fast.langevin_steps.default,
            (x, x.new_empty(0) if v is None else v, potential, list(POTENTIALS[potential]),
             scheme, 0.01, 0.9, 0.1, 2, 0, 0, 3, ""),
        )  # fmt: skip


def test_a_call_compiles_to_one_graph() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        langevin_steps(
            y, potential="ring", parameters=(5.0, 0.5, 1), scheme="euler-maruyama",
            temperature=0.1, dt=0.01, steps=3,
        )  # fmt: skip
        return y + 1

    x, _ = start(5, 2, "euler-maruyama", torch.float64)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), work(x))
