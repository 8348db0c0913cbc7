"""Family `langevin` on the CPU: instruction sets, dimensions, threads and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from langevin_kernel_cases import DTYPES, advanced, assert_same_steps, kinds, start
from scipy import stats

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.langevin import FAMILY, LARGEST_DIM, backend_of, box_muller, langevin_steps
from entropic_fast.ops.langevin.reference import SCHEMES

DIMS = (2, 3, 4, 5, 7, LARGEST_DIM["cpp"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_every_instruction_set_takes_the_reference_s_steps(
    potential: str, scheme: str, dtype: torch.dtype
) -> None:
    for dim in (2,) if potential == "ring" else DIMS:
        for particles, first in ((1, 0), (15, 3), (70, 1)):
            x, v = start(particles, dim, scheme, dtype, seed=dim)
            x[:, :-1] -= 0.7
            options = {"steps": 3, "first_particle": first}
            expected = advanced(x, v, potential, scheme, backend="reference", **options)
            for isa in native.module().runnable_isas():
                native.use_isa(isa)
                actual = advanced(x, v, potential, scheme, backend="cpp", **options)
                assert_same_steps(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    for potential, scheme in kinds():
        x, v = start(3001, 2, scheme, dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(advanced(x, v, potential, scheme, backend="cpp", steps=20))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("potential", "scheme"), kinds())
def test_a_long_run_stays_with_the_reference(potential: str, scheme: str) -> None:
    """Float64: path by path, as the flow across contracts and that along is neutral. Float32: in
    distribution too."""
    x, v = start(500, 2, scheme, torch.float64)
    options = {"steps": 1000, "dt": 0.01}
    expected = advanced(x, v, potential, scheme, backend="reference", **options)
    actual = advanced(x, v, potential, scheme, backend="cpp", **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    v = None if v is None else v.float()
    single = advanced(x.float(), v, potential, scheme, backend="cpp", **options)
    for column in range(2):
        pair = single[:, column].numpy(), expected[:, column].numpy()
        assert stats.ks_2samp(*pair, method="asymp").pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exponential_is_good_to_two_units_of_the_last_place(dtype: torch.dtype) -> None:
    """A ridge of stiffness e^y, one long step from x = 1: what is left over is e^y."""
    y = torch.linspace(-80, 80, 4001, dtype=torch.float64).to(dtype)
    exact = torch.exp(y.double())
    for isa in native.module().runnable_isas():
        native.use_isa(isa)
        x = torch.stack((torch.ones_like(y), y), 1)
        langevin_steps(
            x, potential="ridge", parameters=(1.0, 1.0, 1.0, 0.0), scheme="euler-maruyama",
            temperature=0.0, dt=1.0, steps=1, backend="cpp",
        )  # fmt: skip
        # 1 - x rounds to a unit of the last place of 1: only where e^y is above 1 does it matter
        # little, where it is below the error is measured in such units.
        error = ((1 - x[:, 0]).double() - exact).abs() / exact.clamp(min=1.0)
        assert float(error.max()) <= 2 * torch.finfo(dtype).eps


def test_more_dimensions_than_the_kernel_has_go_to_the_reference() -> None:
    most = LARGEST_DIM["cpp"]
    assert (backend_of(most, "cpu"), backend_of(most + 1, "cpu")) == ("cpp", "reference")
    x, v = start(3, most + 1, "baoab", torch.float64)
    expected = advanced(x, v, "ridge", "baoab", backend="reference")
    assert torch.equal(advanced(x, v, "ridge", "baoab"), expected)
    with pytest.raises(backend.BackendError, match=f"at most {most} dimensions"):
        advanced(x, v, "ridge", "baoab", backend="cpp")
    backend.set_backend("cpp")
    with pytest.raises(backend.BackendError, match=f"at most {most} dimensions"):
        advanced(x, v, "ridge", "baoab")


def test_the_family_is_registered_and_a_call_may_name_its_backend() -> None:
    assert FAMILY in backend.families()
    assert backend.backend_for(FAMILY, "cpu") == "cpp"
    assert backend.backend_for(FAMILY, "cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="backend: expected one of"):
        backend.backend_for(FAMILY, "cpu", "fortran")


N_2 = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3)}, r"x: expected shape \[N, 2\]"),
        ({"x": torch.ones(3, 3)}, r"x: expected shape \[N, 2\] for the ring"),
        ({"x": torch.ones(3, 1), "potential": "channel"}, r"x: expected shape \[N, D\] with D >="),
        ({"x": N_2.half()}, "x: expected dtype float32 or float64"),
        ({"x": torch.ones(2, 3).T}, "x: expected a contiguous tensor"),
        ({"x": torch.ones(3, 2, requires_grad=True)}, "x: .* that autograd"),
        ({"v": N_2}, "v: expected None for euler-maruyama"),
        ({"scheme": "baoab"}, "v: expected .* as x, for baoab"),
        ({"scheme": "baoab", "v": N_2.double()}, "v: expected .* as x, for baoab"),
        ({"scheme": "baoab", "v": torch.ones(2, 3).T}, "v: expected a contiguous tensor"),
        ({"scheme": "heun"}, "scheme: expected one of"),
        ({"potential": "bowl"}, "potential: expected one of"),
        ({"parameters": (1.0, 2.0)}, "parameters: expected finite stiffness, contrast, modes"),
        ({"parameters": (1.0, float("nan"), 1)}, "parameters: expected finite"),
        ({"temperature": -1.0}, "temperature: expected a finite number of at least"),
        ({"dt": 0.0}, "dt: expected a finite number above 0"),
        ({"friction": 0.0}, "friction: expected a finite number above 0"),
        ({"steps": -1}, "steps: expected an integer"),
        ({"first_step": -1}, "first_step: expected an integer"),
        ({"first_particle": -1}, "first_particle: expected an integer"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"backend": "fortran"}, "backend: expected one of"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": N_2.clone(), "potential": "ring", "parameters": (5.0, 0.5, 1),
        "scheme": "euler-maruyama", "temperature": 0.1, "dt": 0.01, "steps": 1,
    }  # fmt: skip
    if changes.get("potential") == "channel":
        changes = {"parameters": (5.0, 0.5, 1.0), **changes}
    with pytest.raises(ValueError, match=message):
        langevin_steps(**{**arguments, **changes})


def test_velocities_in_the_memory_of_positions_are_refused() -> None:
    x = torch.ones(4, 2)
    for v in (x, x.view(-1)[2:].view(3, 2)):
        with pytest.raises(ValueError, match="x: expected memory of its own, apart from v"):
            advanced_in_place(x[: len(v)], v)


def advanced_in_place(x: torch.Tensor, v: torch.Tensor) -> None:
    langevin_steps(
        x, v, potential="ring", parameters=(5.0, 0.5, 1), scheme=SCHEMES[-1],
        temperature=0.1, dt=0.01, steps=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "dtype", "message"),
    [
        (torch.ones(3, dtype=torch.int64), torch.float64, r"words: expected shape \[n, 2\]"),
        (torch.ones(3, 2, dtype=torch.int32), torch.float64, "words: expected .* int64"),
        (torch.full((3, 2), 2**32), torch.float64, r"words: expected numbers in \[0, 2\^32\)"),
        (torch.full((3, 2), -1), torch.float64, r"words: expected numbers in \[0, 2\^32\)"),
        (torch.ones(3, 2, dtype=torch.int64), torch.float16, "dtype: expected float32 or float64"),
    ],
)
def test_bad_words_are_refused(words: torch.Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_muller(words, dtype)
