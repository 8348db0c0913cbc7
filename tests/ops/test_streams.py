import hashlib
import math

import pytest
import torch
from scipy import stats

from entropic_fast._utils import workspace as scratch
from entropic_fast.ops.random_bits.streams import (
    fold_in,
    normal,
    permutation,
    permutations,
    philox,
    rademacher,
    rademacher_columns,
    uniform,
    words,
)

FULL = 2**64 - 1
# (c0 and c1, key, c2 and c3, output): Random123's published vectors for philox4x32-10.
KNOWN = [
    (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (FULL, FULL, FULL, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        0x85A308D3_243F6A88,
        0x299F31D0_A4093822,
        0x03707344_13198A2E,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "stream", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(counter, key, stream, expected):
    signed = counter - 2**64 if counter >= 2**63 else counter
    got = philox(torch.tensor(signed), key, stream)
    assert " ".join(f"{w:08x}" for w in got.tolist()) == expected


def test_philox_agrees_with_plain_integers_at_random_keys():
    # An implementation that shares nothing with ours: plain Python integers.
    def reference(c, k):
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [
                (p1 >> 32) ^ c[1] ^ k[0],
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ c[3] ^ k[1],
                p0 & 0xFFFFFFFF,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        counter, key, stream = torch.randint(2**62, (3,), generator=generator).tolist()
        halves = [(v & 0xFFFFFFFF, v >> 32) for v in (counter, stream, key)]
        expected = reference([*halves[0], *halves[1]], list(halves[2]))
        assert philox(torch.tensor(counter), key, stream).tolist() == expected


def test_philox_keeps_the_counters_shape():
    assert philox(torch.zeros(3, 0, dtype=torch.int64), 1).shape == (3, 0, 4)
    assert philox(torch.zeros(2, 5, dtype=torch.int64), 1).shape == (2, 5, 4)


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 1), (1, 2), (3, 9), (4, 4), (5, 0)])
def test_words_are_a_window_of_one_stream(start, count):
    assert torch.equal(words(count, 7, 2, start=start), words(40, 7, 2)[start : start + count])


def test_streams_and_seeds_are_different():
    rows = [words(8, s, t).tolist() for s in (0, 1) for t in (0, 1)]
    assert len({tuple(r) for r in rows}) == 4


def test_uniform_is_uniform_and_open():
    u = uniform((20000,), seed=11)
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_normal_is_normal():
    x = normal((20001,), seed=12)
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert torch.isfinite(x).all()
    pairs = x[:20000].reshape(-1, 2)
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.04  # the two of a pair, 4 sigma


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_numbers_from_a_start_on_are_those_of_the_stream(start, count):
    for draw in (uniform, normal):
        whole = draw((start + count,), seed=21, stream=2)
        assert torch.equal(draw((count,), seed=21, stream=2, start=start), whole[start:])


def test_rademacher_is_balanced_and_has_the_dtype():
    signs = rademacher((3, 3000), seed=13, dtype=torch.float32)
    assert signs.dtype == torch.float32 and signs.shape == (3, 3000)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < 4 * math.sqrt(signs.numel())


@pytest.mark.parametrize("n", [0, 1, 2, 5, 1000])
def test_permutation_holds_every_index_once(n):
    assert sorted(permutation(n, seed=3).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [0, 1, 2, 33, 32_768, 40_001])
@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_permutations_are_those_of_each_seed_and_stream(n, at_once, monkeypatch):
    monkeypatch.setattr(scratch, "CPU", scratch.CPU._replace(keys=at_once))
    seeds = [5, 2**63 + 1]
    orders = permutations(n, torch.tensor([5, -(2**63) + 1]), stream=3, streams=2)
    assert orders.shape == (2, 2, n)
    for t, row in enumerate(orders):
        for s, order in zip(seeds, row, strict=True):
            assert torch.equal(order, permutation(n, s, 3 + t))
    assert permutations(n, torch.tensor([5]), streams=0).shape == (0, 1, n)
    assert permutations(n, torch.tensor([]).long(), streams=2).shape == (2, 0, n)


def test_a_permutation_sorts_63_bits_of_two_words():
    first, second = words(2000, 8, 3).view(-1, 2).T
    assert torch.equal(permutation(1000, 8, 3), ((first << 31) ^ second).argsort(stable=True))


@pytest.mark.parametrize("streams", [range(0), range(3), range(5, 15), range(2, 9, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_columns_of_signs_are_those_of_each_stream(streams, dtype):
    columns = rademacher_columns(37, 6, streams, dtype=dtype, device=None)
    assert columns.shape == (37, len(streams)) and columns.dtype == dtype
    for column, stream in zip(columns.T, streams, strict=True):
        assert torch.equal(column, rademacher((37,), 6, stream, dtype=dtype))


def test_every_permutation_of_four_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(permutation(4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_shapes_of_size_zero_and_scalars():
    assert uniform((), 0).shape == () and normal((0, 3), 0).shape == (0, 3)
    assert rademacher((1,), 0).shape == (1,)


def test_numbers_do_not_depend_on_threads_or_the_global_generator():
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    first = normal((5000,), 4)
    try:
        torch.set_num_threads(1)
        torch.manual_seed(123)
        assert torch.equal(normal((5000,), 4), first)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def test_derive_is_fixed_and_separates_names():
    expected = int.from_bytes(hashlib.sha256(b"5\x1fa\x1fb").digest()[:8], "little") >> 1
    assert fold_in(5, "a", "b") == expected
    seeds = {
        fold_in(0),
        fold_in(0, "a"),
        fold_in(0, "a", 1),
        fold_in(0, "a", 11),
        fold_in(0, "ab"),
        fold_in(1, "a"),
        fold_in(0, "a", "b"),
    }
    assert len(seeds) == 7 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_words():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert torch.equal(words(1001, 9, 3, device="cuda").cpu(), words(1001, 9, 3))
