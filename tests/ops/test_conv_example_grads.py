"""Family `conv_example_grads`: every backend that can run here against autograd, per example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.conv_example_grads import conv_weight_grads, conv_weight_norms

DTYPES = [torch.float32, torch.float64]
ISAS: list[str] = native.module().runnable_isas()
# Sums of a few hundred products in float32, in another order than the oracle's float64.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


@dataclass(frozen=True)
class Case:
    """A convolution; `after` is zeros appended to each dimension beyond `padding` before it."""

    n: int
    size: tuple[int, ...]
    channels: tuple[int, int]  # C, O
    kernel: tuple[int, ...]
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    groups: int = 1

    def arguments(self) -> dict[str, Any]:
        dims = len(self.size)
        return {
            "kernel": list(self.kernel),
            "stride": [self.stride] * dims,
            "padding": [self.before] * dims,
            "dilation": [self.dilation] * dims,
            "groups": self.groups,
        }

    def tensors(self, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        positions = [
            (size + self.before + self.after - (k - 1) * self.dilation - 1) // self.stride + 1
            for size, k in zip(self.size, self.kernel, strict=True)
        ]
        assert all(p >= 1 for p in positions), "this case has no output"
        a, g = (
            torch.randn(self.n, *shape, c, generator=generator, dtype=torch.float64)
            for shape, c in zip((self.size, positions), self.channels, strict=True)
        )
        return a.to(device, dtype), g.to(device, dtype)

    def oracle(self, a: Tensor, g: Tensor) -> Tensor:
        """Weight gradients by autograd in float64, one example after the other, channels last."""
        dims = len(self.size)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        channels, outputs = self.channels
        rows = []
        for one, grad in zip(a.cpu().double(), g.cpu().double(), strict=True):
            weight = torch.zeros(
                outputs, channels // self.groups, *self.kernel, dtype=torch.float64
            ).requires_grad_()
            padded = F.pad(one.movedim(-1, 0), (self.before, self.after) * dims)
            result = convolution(
                padded, weight, stride=self.stride, dilation=self.dilation, groups=self.groups
            )
            result.backward(grad.movedim(-1, 0))
            assert weight.grad is not None
            rows.append(weight.grad.movedim(1, -1).flatten())
        return torch.stack(rows)


CASES = {
    "3x3": Case(3, (6, 5), (16, 16), (3, 3), before=1, after=1),
    "3x3-wide": Case(2, (4, 4), (64, 40), (3, 3), before=1, after=1),
    "3x3-uneven-channels": Case(3, (5, 6), (19, 13), (3, 3), before=1, after=1),
    "3x3-stride-2": Case(2, (8, 7), (16, 24), (3, 3), stride=2, before=1, after=1),
    "first-layer": Case(2, (7, 7), (3, 16), (3, 3), before=1, after=1),
    "first-layer-7x7": Case(2, (17, 16), (3, 10), (7, 7), stride=2, before=3, after=3),
    "one-by-one": Case(2, (5, 4), (32, 16), (1, 1)),
    "one-by-one-stride-2": Case(2, (8, 7), (17, 9), (1, 1), stride=2),
    "one-by-one-stride-3-padded": Case(2, (7, 7), (5, 9), (1, 1), stride=3, before=2, after=1),
    "uneven-kernel": Case(2, (6, 9), (8, 6), (2, 5), before=2, after=1),
    "dilated": Case(2, (9, 8), (12, 10), (3, 3), dilation=2, before=2, after=2),
    "dilated-strided": Case(2, (11, 12), (5, 4), (3, 2), dilation=3, stride=2, before=1),
    "padding-before-only": Case(2, (5, 5), (6, 7), (3, 3), before=2),
    "padding-after-only": Case(2, (5, 5), (6, 7), (3, 3), after=2),
    "padding-beyond-kernel": Case(2, (2, 3), (4, 4), (2, 2), before=4, after=3),
    "tail-unused": Case(2, (8, 9), (4, 4), (2, 2), stride=4),
    "grouped": Case(2, (6, 6), (12, 8), (3, 3), groups=4, before=1, after=1),
    "grouped-wide": Case(2, (4, 5), (64, 32), (3, 3), groups=2, before=1, after=1),
    "depthwise": Case(3, (6, 7), (37, 37), (3, 3), groups=37, before=1, after=1),
    "depthwise-5x5-stride-2": Case(2, (9, 9), (20, 20), (5, 5), groups=20, stride=2, before=2),
    "depthwise-multiplier": Case(2, (6, 5), (10, 30), (3, 3), groups=10, before=1, after=1),
    "depthwise-dilated": Case(2, (9, 9), (17, 17), (3, 3), groups=17, dilation=2, before=2),
    "depthwise-few": Case(2, (5, 5), (2, 2), (3, 3), groups=2, before=1, after=1),
    "1d": Case(3, (20,), (7, 11), (5,), stride=2, before=2, after=2),
    "1d-grouped": Case(2, (13,), (6, 4), (3,), groups=2, dilation=2, before=1),
    "1d-depthwise": Case(2, (13,), (6, 6), (4,), groups=6, before=3),
    "3d": Case(2, (4, 5, 6), (5, 6), (3, 2, 3), before=1, after=1),
    "3d-strided": Case(2, (5, 5, 7), (16, 9), (2, 3, 2), stride=2, before=1, after=1),
    "3d-depthwise": Case(2, (4, 5, 4), (18, 18), (2, 2, 3), groups=18, before=1, after=1),
    "3d-depthwise-multiplier": Case(2, (3, 4, 4), (70, 140), (2, 1, 2), groups=70),
    "one-example": Case(1, (4, 4), (9, 33), (3, 3), before=1, after=1),
    "one-of-everything": Case(1, (1,), (1, 1), (1,)),
    "one-pixel": Case(3, (1, 1), (5, 20), (3, 3), before=1, after=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_and_norms_are_those_of_autograd_example_by_example(
    place: str, case: Case, dtype: torch.dtype
) -> None:
    a, g = case.tensors(dtype, place)
    expected = case.oracle(a, g)
    grads = conv_weight_grads(a, g, **case.arguments())
    assert_close(grads, expected.to(dtype), TOLERANCE[dtype])
    norms = conv_weight_norms(a, g, **case.arguments())
    assert_close(norms, expected.square().sum(1), TOLERANCE[dtype])


@pytest.mark.parametrize("case", ["3x3-uneven-channels", "grouped", "depthwise", "1d", "3d"])
def test_slices_are_read_and_written_in_place(place: str, case: str) -> None:
    """Channel slices of wider tensors, every second example, columns of a wider buffer."""
    a, g = CASES[case].tensors(torch.float64, place)
    arguments = CASES[case].arguments()
    expected = conv_weight_grads(a, g, **arguments)
    wide_a, wide_g = (
        torch.full((2 * t.shape[0], *t.shape[1:-1], t.shape[-1] + 7), torch.nan, dtype=t.dtype)
        for t in (a, g)
    )
    inner_a, inner_g = wide_a.to(place)[::2, ..., 3:-4], wide_g.to(place)[::2, ..., 1:-6]
    inner_a.copy_(a)
    inner_g.copy_(g)
    buffer = torch.full((len(a), expected.shape[1] + 9), 5.0, dtype=torch.float64, device=place)
    returned = conv_weight_grads(inner_a, inner_g, **arguments, out=buffer[:, 4:-5])
    assert returned.data_ptr() == buffer[:, 4:].data_ptr()
    assert torch.equal(buffer[:, 4:-5], expected)
    assert bool((buffer[:, :4] == 5).all()) and bool((buffer[:, -5:] == 5).all())
    norms = conv_weight_norms(inner_a, inner_g, **arguments)
    assert torch.equal(norms, conv_weight_norms(a, g, **arguments))


def test_channels_first_memory_gives_the_same(place: str) -> None:
    a, g = CASES["3x3"].tensors(torch.float64, place)
    arguments = CASES["3x3"].arguments()
    first_a, first_g = (t.movedim(-1, 1).contiguous().movedim(1, -1) for t in (a, g))
    assert first_a.stride(-1) != 1
    expected = conv_weight_grads(a, g, **arguments)
    assert torch.equal(conv_weight_grads(first_a, first_g, **arguments), expected)
    assert torch.equal(
        conv_weight_norms(first_a, first_g, **arguments), conv_weight_norms(a, g, **arguments)
    )


def test_expanded_examples_and_pixels_are_read_in_place(place: str) -> None:
    a, g = CASES["3x3"].tensors(torch.float64, place)
    arguments = CASES["3x3"].arguments()
    same_a, same_g = a[:1, :1].expand_as(a), g[:1, :, :1].expand_as(g)
    expected = conv_weight_grads(same_a.contiguous(), same_g.contiguous(), **arguments)
    assert torch.equal(conv_weight_grads(same_a, same_g, **arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_examples_channels_or_positions_is_no_special_case(
    place: str, dtype: torch.dtype
) -> None:
    sizes: dict[str, Any] = {"kernel": [3], "stride": [1], "padding": [1], "dilation": [1]}
    for n, length, channels, positions, outputs in (
        (0, 5, 4, 5, 6), (2, 5, 0, 5, 6), (2, 5, 4, 5, 0), (2, 5, 4, 0, 6), (2, 0, 4, 2, 6),
    ):  # fmt: skip
        a = torch.ones(n, length, channels, dtype=dtype, device=place)
        g = torch.ones(n, positions, outputs, dtype=dtype, device=place)
        grads = conv_weight_grads(a, g, **sizes)
        assert torch.equal(grads, torch.zeros(n, outputs * 3 * channels, dtype=dtype, device=place))
        norms = conv_weight_norms(a, g, **sizes)
        assert torch.equal(norms, torch.zeros(n, dtype=torch.float64, device=place))


def test_norms_survive_where_float32_squares_would_not(place: str) -> None:
    case = CASES["3x3"]
    a, g = case.tensors(torch.float32, place)
    for scale in (1e-30, 1e25):
        expected = case.oracle(a, g * scale).square().sum(1)
        assert_close(conv_weight_norms(a, g * scale, **case.arguments()), expected, 2e-6)


@pytest.mark.parametrize("case", ["3x3", "depthwise", "grouped"])
def test_a_bad_value_stays_in_its_example(place: str, case: str) -> None:
    a, g = CASES[case].tensors(torch.float32, place)
    arguments = CASES[case].arguments()
    clean = conv_weight_grads(a, g, **arguments)
    a[1, 0, 0, 0] = torch.nan
    spoiled = conv_weight_grads(a, g, **arguments)
    assert torch.equal(spoiled[0], clean[0]) and torch.equal(spoiled[2:], clean[2:])
    assert bool(spoiled[1].isnan().any())
    norms = conv_weight_norms(a, g, **arguments)
    assert bool(norms[1].isnan()) and bool(norms[0].isfinite())


# ---- the compiled kernels -----------------------------------------------------------------------

# Larger than what the kernels sum in one go.
LARGE = {
    "large": Case(1, (45, 40), (64, 33), (3, 3), before=1, after=1),
    "large-strided": Case(1, (81, 90), (40, 70), (3, 3), stride=2, before=2, after=1),
    "large-dilated": Case(1, (50, 44), (40, 36), (3, 3), dilation=3, before=4),
    "large-grouped": Case(1, (64, 60), (96, 64), (3, 3), groups=2, before=1, after=1),
    "large-depthwise": Case(1, (60, 61), (37, 37), (3, 3), groups=37, before=1, after=1),
    "large-3d": Case(1, (7, 25, 30), (9, 20), (3, 3, 3), before=1, after=1),
    "large-planes": Case(1, (3, 70, 60), (20, 20), (2, 3, 3), stride=2, before=1, after=1),
    "long": Case(1, (9000,), (4, 9), (5,), before=2, after=2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_images_are_summed_whole(place: str, case: Case, dtype: torch.dtype) -> None:
    test_gradients_and_norms_are_those_of_autograd_example_by_example(place, case, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_gradients(isa: str, dtype: torch.dtype) -> None:
    backend.set_backend("cpp")
    native.use_isa(isa)
    for case in [*CASES.values(), LARGE["large"], LARGE["large-depthwise"]]:
        test_gradients_and_norms_are_those_of_autograd_example_by_example("cpu", case, dtype)


@pytest.mark.parametrize("outputs", range(1, 19))
@pytest.mark.parametrize("channels", [1, 2, 5, 8, 11, 16, 21, 33])
def test_every_shape_of_tile_is_right(channels: int, outputs: int) -> None:
    """All heights of a tile, and one to several vectors with a rest."""
    case = Case(1, (3, 2), (channels, outputs), (2, 1), before=1)
    backend.set_backend("cpp")
    for isa in ISAS:
        native.use_isa(isa)
        test_gradients_and_norms_are_those_of_autograd_example_by_example(
            "cpu", case, torch.float32
        )


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("case", ["3x3-wide", "grouped-wide", "depthwise", "large"])
def test_results_do_not_depend_on_the_number_of_threads(case: str, n: int) -> None:
    backend.set_backend("cpp")
    given = {**CASES, **LARGE}[case]
    a, g = replace(given, n=n, size=tuple(3 * s for s in given.size)).tensors(torch.float32, "cpu")
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(
            (
                conv_weight_grads(a, g, **given.arguments()),
                conv_weight_norms(a, g, **given.arguments()),
            )
        )
    for grads, norms in results[1:]:
        assert torch.equal(grads, results[0][0])
        assert torch.equal(norms, results[0][1])


# ---- registration and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_weight_grads", "conv_weight_norms"])
def test_opcheck_passes(place: str, name: str) -> None:
    a, g = (torch.randn(2, 1, 4, 4, 6, device=place) for _ in range(2))
    sizes = ([1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 2)
    out = (
        () if name == "conv_weight_norms" else (torch.empty(2, 6 * 9 * 3 + 4, device=place)[:, 4:],)
    )
    torch.library.opcheck(getattr(torch.ops.entropic_fast, name).default, (a, g, *out, *sizes))


def bad_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    a, g = torch.zeros(2, 4, 4, 6), torch.zeros(2, 4, 4, 8)
    return {
        "rank": (r"a: expected shape \[n, \*in, C\]", {"a": torch.zeros(2, 6)}),
        "ranks": ("g: expected 2 spatial dimensions", {"g": torch.zeros(2, 4, 8)}),
        "kernel": ("kernel: expected 2 numbers", {"kernel": [3]}),
        "number": ("stride: expected 2 numbers", {"stride": 1}),
        "zero": ("stride: expected an integer of at least 1", {"stride": [1, 0]}),
        "negative": ("padding: expected an integer of at least 0", {"padding": [0, -1]}),
        "groups": ("groups: expected an integer of at least 1", {"groups": 0}),
        "divide": ("g: expected a number of channels that 3 groups divide", {"groups": 3}),
        "half": ("a: expected dtype float32 or float64", {"a": a.half()}),
        "mixed": ("g: expected dtype torch.float32 as a, ", {"g": g.double()}),
        "examples": ("g: expected 2 examples", {"g": g[:1]}),
        "device": ("g: expected device cpu", {"g": g.to("meta")}),
        "shape": (r"out: expected shape \[2, 432\]", {"out": torch.zeros(2, 431)}),
        "out-dtype": ("out: expected dtype", {"out": torch.zeros(2, 432).double()}),
        "columns": ("out: expected rows that are contig", {"out": torch.zeros(432, 2).t()}),
        "rows": ("out: expected rows that are contig", {"out": torch.zeros(1, 432).expand(2, -1)}),
        "overlap": ("out: expected memory of its own, apart from a", {
            "a": (buffer := torch.zeros(2000))[:192].view(2, 4, 4, 6),
            "out": buffer[100:964].view(2, 432),
        }),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    backend.set_backend("reference")
    message, changes = bad_calls()[name]
    arguments: dict[str, Any] = {
        "a": torch.zeros(2, 4, 4, 6), "g": torch.zeros(2, 4, 4, 8), "kernel": [3, 3],
        "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        conv_weight_grads(**{**arguments, **changes})
    if "out" not in changes:
        with pytest.raises(ValueError, match=message):
            conv_weight_norms(**{**arguments, **changes})
