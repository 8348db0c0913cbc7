"""Family `random_bits`: every backend that can run here gives the published generator's words."""

from __future__ import annotations

import emulated_cuda
import pytest
import torch
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.random_bits import LARGEST_INDEX, fill_, philox
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.ops.random_bits.reference import KINDS

CUDA_FAMILY = "random_bits"

KIND_DTYPES = [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes]
# Memory orders of out's dimensions (streams, seeds, numbers), slowest first.
ORDERS = [(0, 1, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0)]
MASK = 0xFFFFFFFF


def plain_words(counter: int, stream: int, key: int) -> list[int]:
    """Philox-4x32-10 in Python's integers: shares nothing with the package."""
    c = [counter & MASK, counter >> 32 & MASK, stream & MASK, stream >> 32 & MASK]
    k = [key & MASK, key >> 32 & MASK]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & MASK, a >> 32 ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def plain_number(j: int, stream: int, key: int, kind: str) -> float:
    def word(i: int) -> int:
        return plain_words(i // 4, stream, key)[i % 4]

    if kind == "sort_keys":
        return word(2 * j) << 31 ^ word(2 * j + 1)
    if kind == "uniform":
        return (word(j) + 0.5) / 2**32
    return (1 if word(j) >= 2**31 else -1) if kind == "signs" else word(j)


def empty(
    shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, device: str
) -> Tensor:
    """Numbers that no kernel writes by chance, in another order of memory."""
    stored = torch.full([shape[d] for d in order], 77, dtype=dtype, device=device)
    return stored.permute([order.index(d) for d in range(3)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kind", "dtype"), KIND_DTYPES)
def test_numbers_are_those_of_plain_integers(
    place: str, kind: str, dtype: torch.dtype, order: tuple[int, ...]
) -> None:
    keys = [0, 5, 2**63 + 11, 2**64 - 1, 2**32]
    seeds = torch.tensor([k - 2**64 if k >= 2**63 else k for k in keys], device=place)
    for first_stream, start in ((0, 0), (2**64 - 1, 3), (2**32 - 1, 2**33 + 1)):
        out = empty((3, len(keys), 7), order, dtype, place)
        fill_(out, seeds, kind=kind, first_stream=first_stream, start=start)
        expected = [
            [[plain_number(start + j, (first_stream + t) % 2**64, k, kind) for j in range(7)]
             for k in keys]
            for t in range(3)
        ]  # fmt: skip
        wide = dtype if kind in ("words", "sort_keys") else torch.float64
        assert torch.equal(out.cpu(), torch.tensor(expected, dtype=wide).to(dtype))


@pytest.mark.parametrize(
    "shape",
    [(0, 1, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (1, 1, 1031), (8, 1, 517), (9, 1, 33), (2, 20, 5)],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_sizes_agree_with_the_reference(
    place: str, shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    seeds = torch.randint(2**62, shape[1:2], generator=torch.Generator().manual_seed(1))
    for kind, dtypes in KINDS.items():
        for start in (0, 1, 2, 3, LARGEST_INDEX - shape[2]):
            out = empty(shape, order, dtypes[-1], place)
            fill_(out, seeds.to(place), kind=kind, start=start)
            expected = fill_(
                torch.empty(shape, dtype=dtypes[-1]), seeds, kind=kind, start=start,
                backend="reference",
            )  # fmt: skip
            assert torch.equal(out.cpu(), expected)


def test_a_call_writes_nothing_beside_its_numbers(place: str) -> None:
    wide = torch.full((10, 9), 7.0, device=place)
    inner = wide[1:9, 2:7].T[:, None]  # [5, 1, 8]
    fill_(inner, 3, kind="signs", first_stream=1)
    assert bool((wide[1:9, 2:7].abs() == 1).all())
    assert int((wide == 7).sum()) == 90 - 40
    column = torch.full((12,), 7.0, device=place)
    fill_(column[1::3].view(1, 1, 4), 3, kind="signs")
    assert column.eq(7).tolist() == [True, False, True] * 4


def test_one_seed_is_a_tensor_of_one(place: str) -> None:
    one, other = (torch.empty(2, 1, 9, dtype=torch.int64, device=place) for _ in range(2))
    fill_(one, 2**64 - 5, kind="words", first_stream=6)
    fill_(other, torch.tensor([-5], device=place), kind="words", first_stream=6)
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 131), (2, 1000)])
def test_philox_at_any_counters(place: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    whole = torch.randint(-(2**63), 2**63 - 1, (shape[1], 2 * shape[0]), generator=generator)
    counters = whole.T[::2]  # [m, n], strided
    seeds, streams = torch.randint(-(2**63), 2**63 - 1, (2, shape[0]), generator=generator)
    found = philox(*(t.to(place) for t in (counters, seeds, streams)))
    expected = [
        [plain_words(*(int(i) % 2**64 for i in (c, t, s))) for c in row]
        for row, s, t in zip(counters, seeds, streams, strict=True)
    ]
    assert torch.equal(found.cpu(), torch.tensor(expected, dtype=torch.int64).view(*shape, 4))


def test_counters_may_be_shared_by_all_rows(place: str) -> None:
    counters = torch.arange(5, device=place).expand(3, -1)
    zero = torch.zeros(3, dtype=torch.int64, device=place)
    found = philox(counters, zero, zero).cpu()
    assert torch.equal(found, random.words(20, 0).view(1, 5, 4).expand(3, -1, -1))


@pytest.mark.parametrize("isa", native.cpu_facts()["runnable_isas"])  # type: ignore[attr-defined]
def test_instruction_sets_and_threads_give_the_same_bits(isa: str) -> None:
    expected = fill_(torch.empty(1, 1, 70_000), 9, kind="uniform", start=1, backend="reference")
    native.use_isa(isa)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = fill_(torch.empty(1, 1, 70_000), 9, kind="uniform", start=1, backend="cpp")
        assert torch.equal(found, expected)
        columns = fill_(torch.empty(9_000, 9).T[:, None], 9, kind="signs", backend="cpp")
        assert torch.equal(columns[4, 0], random.rademacher((9_000,), 9, 4, dtype=torch.float32))


# ---- registration and checks ---------------------------------------------------------------------


def test_opcheck_passes(place: str) -> None:
    ops = torch.ops.entropic_fast
    seeds = torch.tensor([1, 2, 3], device=place)
    for kind, dtypes in KINDS.items():
        out = torch.empty(2, 3, 5, dtype=dtypes[0], device=place)
        torch.library.opcheck(ops.random_fill.default, (out, seeds, 0, 1, 2, kind, ""))
        torch.library.opcheck(ops.random_fill.default, (out[:, :1], seeds[:0], 7, 0, 0, kind, ""))
    counters = torch.arange(6, device=place).view(3, 2)
    torch.library.opcheck(ops.random_philox.default, (counters, seeds, seeds, ""))


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.skipif(emulated_cuda.SANITIZED, reason="instrumented stacks are too slow for it")
def test_threads_in_cuda_go_on_to_further_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid has 8,192 thread blocks of 256 at most."""
    several = torch.empty(1, 1, 4 * 256 * 8192 + 5, dtype=torch.float16)
    expected = torch.empty_like(several)
    fill_(expected, torch.tensor([3]), kind="signs")
    backend.set_backend(emulated_cuda.stand_in("random_bits", monkeypatch))
    fill_(several, torch.tensor([3]), kind="signs")
    assert torch.equal(several, expected)


def test_a_call_compiles_to_one_graph() -> None:
    def work(x: Tensor) -> Tensor:
        fill_(x[None, None], 4, kind="signs")
        return 2 * x

    x = torch.empty(6)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), work(torch.empty(6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bits"}, "kind: expected one of 'words'"),
        ({"out": torch.empty(2, 3, dtype=torch.float64)}, "out: expected shape"),
        ({"out": torch.empty(1, 2, 3).double(), "kind": "words"}, "of int64, got"),
        ({"out": torch.empty(1, 2, 3).half(), "kind": "uniform"}, "of float64 or float32, got"),
        ({"out": torch.empty(1, 2, 1).expand(1, 2, 3)}, "out: expected memory of its own"),
        ({"seeds": torch.tensor([1, 2, 3])}, r"seeds: expected shape \[2\] of int64"),
        ({"seeds": torch.tensor([1.0, 2.0])}, r"seeds: expected shape \[2\] of int64"),
        ({"seeds": 3}, "seeds: expected 2 of them, as out has so many, got one"),
        ({"start": -1}, "start: expected numbers from 0 to 2"),
        ({"start": LARGEST_INDEX}, "start: expected numbers from 0 to 2"),
    ],
)
def test_errors_say_what_does_not_fit(change: dict[str, object], message: str) -> None:
    call = {"out": torch.empty(1, 2, 3), "seeds": torch.tensor([1, 2]), "kind": "signs"} | change
    with pytest.raises(ValueError, match=message):
        fill_(**call)  # type: ignore[arg-type]


def test_philox_says_what_does_not_fit() -> None:
    counters, rows = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"counters: expected shape \[m, n\] of int64"):
        philox(counters[0], rows, rows)
    with pytest.raises(ValueError, match=r"seeds: expected shape \[2\] of int64"):
        philox(counters, rows[:1], rows)
    with pytest.raises(ValueError, match=r"streams: expected shape \[2\] of int64"):
        philox(counters, rows, rows.double())
