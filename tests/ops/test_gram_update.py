"""Family `gram_update`: every backend that can run here against explicit float64 products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from entropic_fast._utils import workspace as scratch
from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.gram_update import BLOCK, FAMILY, cross_update_, symmetric_update_

# (dtype of the rows, double_products)
KINDS = [(torch.float32, False), (torch.float32, True), (torch.float64, False)]
KIND_NAMES = ["float32", "float32-in-double", "float64"]
EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_entries(
    actual: Tensor,  # [M, N] float64, what the update added
    a: Tensor,  # [M, K]
    b: Tensor,  # [N, K]
    double: bool,
) -> None:
    """Each entry within the bound of its kind of sum: of 256 columns, or float64 throughout."""
    a, b = a.double().cpu(), b.double().cpu()
    columns = a.shape[1]
    bound = 0.5 * EPS32 * min(columns, BLOCK) + EPS64 * columns
    if double:
        bound = EPS64 * max(1, columns)
    error = (actual.cpu() - a @ b.T).abs()
    assert (error <= bound * (a.abs() @ b.abs().T)).all()


# ---- against float64 products -------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 1, 2, 255, 256, 257, 700])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 30, 101])
@pytest.mark.parametrize(("dtype", "double"), KINDS, ids=KIND_NAMES)
def test_the_lower_triangle_gains_the_products_and_the_upper_is_not_touched(
    place: str, dtype: torch.dtype, double: bool, count: int, columns: int
) -> None:
    rows = randn(count, columns, seed=1, dtype=dtype, device=place)
    gram = torch.zeros(count, count, dtype=torch.float64, device=place)
    marked = torch.ones_like(gram, dtype=torch.bool).triu(1)
    gram[marked] = torch.nan
    symmetric_update_(gram, rows, double_products=double)
    assert gram[marked].isnan().all()
    lower = gram.where(~marked, (rows.double() @ rows.double().T))
    assert_entries(lower, rows, rows, double or dtype == torch.float64)


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (1, 1, 1), (5, 9, 0), (9, 50, 300)])
@pytest.mark.parametrize(("dtype", "double"), KINDS, ids=KIND_NAMES)
def test_a_cross_update_adds_the_products_of_two_sets_of_rows(
    place: str, dtype: torch.dtype, double: bool, shape: tuple[int, int, int]
) -> None:
    a = randn(shape[0], shape[2], seed=1, dtype=dtype, device=place)
    b = randn(shape[1], shape[2], seed=2, dtype=dtype, device=place)
    out = torch.zeros(shape[0], shape[1], dtype=torch.float64, device=place)
    cross_update_(out, a, b, double_products=double)
    assert_entries(out, a, b, double or dtype == torch.float64)


def test_updates_add_to_what_is_there(place: str) -> None:
    rows = randn(20, 40, seed=1, dtype=torch.float64, device=place)
    start = randn(20, 20, seed=2, dtype=torch.float64, device=place)
    gram = start.clone()
    symmetric_update_(gram, rows[:, :13])
    symmetric_update_(gram, rows[:, 13:])
    torch.testing.assert_close(gram.tril(), (start + rows @ rows.T).tril(), rtol=1e-13, atol=1e-13)
    assert torch.equal(gram.triu(1), start.triu(1))
    out = start.clone()
    cross_update_(out, rows, rows)
    torch.testing.assert_close(out, start + rows @ rows.T, rtol=1e-13, atol=1e-13)


def test_the_two_updates_agree(place: str) -> None:
    rows = randn(150, 600, seed=3, dtype=torch.float64, device=place).float()
    gram, out = torch.zeros(2, 150, 150, dtype=torch.float64, device=place)
    symmetric_update_(gram, rows)
    cross_update_(out, rows, rows.clone())
    assert_close(gram, out.tril(), 1e-6)


@pytest.mark.parametrize(("dtype", "double"), KINDS, ids=KIND_NAMES)
def test_column_slices_of_wider_tensors_are_read_and_written_in_place(
    place: str, dtype: torch.dtype, double: bool
) -> None:
    wide = randn(37, 500, seed=1, dtype=dtype, device=place)
    rows, others = wide[:, 11:290], wide[5:16, 211:490]
    room = torch.full((40, 60), 7.0, dtype=torch.float64, device=place)
    gram = room[1:38, 3:40]
    symmetric_update_(gram, rows, double_products=double)
    untouched = torch.ones_like(room, dtype=torch.bool)
    untouched[1:38, 3:40] = torch.ones_like(gram, dtype=torch.bool).triu(1)
    assert (room[untouched] == 7).all()
    full = (gram - 7).tril() + (gram - 7).tril(-1).T
    assert_entries(full, rows, rows, double or dtype == torch.float64)
    room.fill_(7.0)
    out = room[2:39, 40:51]
    cross_update_(out, rows, others, double_products=double)
    assert_entries(out - 7, rows, others, double or dtype == torch.float64)
    out.fill_(7.0)
    assert (room == 7).all()


def test_one_row_may_stand_for_many(place: str) -> None:
    row = randn(1, 33, seed=1, dtype=torch.float64, device=place)
    out = torch.zeros(9, 4, dtype=torch.float64, device=place)
    cross_update_(out, row.expand(9, 33), row.expand(4, 33))
    torch.testing.assert_close(out, (row @ row.T).expand(9, 4), rtol=1e-14, atol=0.0)


def test_non_finite_rows_show_in_their_own_entries_only(place: str) -> None:
    rows = torch.ones(20, 5, device=place)
    rows[3, 2] = torch.nan
    gram = torch.zeros(20, 20, dtype=torch.float64, device=place)
    symmetric_update_(gram, rows)
    expected = torch.zeros(20, 20, dtype=torch.bool, device=place)
    expected[3, :4] = expected[3:, 3] = True
    assert torch.equal(gram.isnan(), expected)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [256, 4096, 65536])
@pytest.mark.parametrize("signs", ["both", "one"])
def test_float32_products_err_less_for_more_columns(place: str, signs: str, columns: int) -> None:
    rows = randn(24, columns, seed=5, dtype=torch.float32, device=place)
    below, limit = -1, EPS32  # entries of the diagonal are sums of one sign
    if signs == "one":  # nothing cancels: partial sums, and their rounding errors, are largest
        rows.abs_()
        below, limit = 0, 8 * EPS32
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    for double, bound in ((False, limit / (columns / BLOCK) ** 0.5), (True, 1e-12)):
        gram = torch.zeros(24, 24, dtype=torch.float64, device=place)
        symmetric_update_(gram, rows, double_products=double)
        error = ((gram - exact).tril(below).abs() / (norms[:, None] * norms)).max().item()
        assert error <= bound


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_torch_does_not_reach_the_reference(precision: str) -> None:
    backend.set_backend("reference")
    rows = randn(40, 300, seed=1, dtype=torch.float32)
    gram = torch.zeros(40, 40, dtype=torch.float64)
    torch.set_float32_matmul_precision(precision)
    try:
        symmetric_update_(gram, rows)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_entries(gram.tril() + gram.tril(-1).T, rows, rows, False)


def test_the_reference_works_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.set_backend("reference")
    small = scratch.CPU._replace(gram=8 * 30 * 7)  # seven rows, or seven columns, at a time
    monkeypatch.setattr(scratch, "CPU", small)
    for dtype, double in KINDS:
        rows = randn(30, 300, seed=1, dtype=dtype)
        gram = torch.zeros(30, 30, dtype=torch.float64)
        symmetric_update_(gram, rows, double_products=double)
        exact = double or dtype == torch.float64
        assert_entries(gram.tril() + gram.tril(-1).T, rows, rows, exact)
        out = torch.zeros(30, 30, dtype=torch.float64)
        cross_update_(out, rows, rows.clone(), double_products=double)
        assert_entries(out, rows, rows, exact)


# ---- instruction sets and threads ---------------------------------------------------------------

SIZES = [(1, 1), (5, 3), (31, 40), (49, 257), (100, 256), (230, 1300)]


def both_updates(count: int, columns: int, dtype: torch.dtype, double: bool) -> list[Tensor]:
    rows = randn(count, columns, seed=1, dtype=dtype)
    others = randn(count // 2 + 3, columns, seed=2, dtype=dtype)
    gram = torch.zeros(count, count, dtype=torch.float64)
    out = torch.zeros(len(others), count, dtype=torch.float64)
    symmetric_update_(gram, rows, double_products=double)
    cross_update_(out, others, rows, double_products=double)
    double = double or dtype == torch.float64
    assert_entries(gram + gram.tril(-1).T, rows, rows, double)
    assert_entries(out, others, rows, double)
    return [gram, out]


@pytest.mark.parametrize("count, columns", SIZES)
@pytest.mark.parametrize(("dtype", "double"), KINDS, ids=KIND_NAMES)
def test_every_instruction_set_is_right(
    dtype: torch.dtype, double: bool, count: int, columns: int
) -> None:
    backend.set_backend("cpp")
    isas = native.module().runnable_isas()
    assert "portable" in isas
    for isa in isas:
        native.use_isa(isa)
        assert native.module().current_isa() == isa
        both_updates(count, columns, dtype, double)


@pytest.mark.parametrize(("dtype", "double"), KINDS, ids=KIND_NAMES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, double: bool) -> None:
    backend.set_backend("cpp")
    for isa in native.module().runnable_isas():
        native.use_isa(isa)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(both_updates(230, 1300, dtype, double))
        for gram, out in results[1:]:
            assert torch.equal(gram, results[0][0]) and torch.equal(out, results[0][1])


# ---- torch.library ------------------------------------------------------------------------------


def test_opcheck_passes(place: str) -> None:
    rows = randn(9, 20, seed=1, dtype=torch.float32, device=place)
    gram = torch.zeros(9, 12, dtype=torch.float64, device=place)
    ops = torch.ops.entropic_fast
    torch.library.opcheck(ops.gram_symmetric_update_.default, (gram[:, 2:11], rows[:, 3:17], False))
    torch.library.opcheck(ops.gram_cross_update_.default, (gram[:4, :9], rows[:4], rows, True))


def test_an_update_compiles_to_one_graph() -> None:
    def work(gram: Tensor, rows: Tensor) -> Tensor:
        symmetric_update_(gram, 2 * rows)
        return gram.sum()

    rows = randn(9, 20, seed=1, dtype=torch.float32)
    one, other = torch.zeros(2, 9, 9, dtype=torch.float64)
    expected = work(one, rows)
    actual = torch.compile(work, fullgraph=True, backend="aot_eager")(other, rows)
    assert torch.equal(one, other) and actual == expected


# ---- refusals -----------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows: expected shape \[E, K\]"),
        ({"rows": torch.zeros(3, 4, dtype=torch.float16)}, "rows: expected dtype float32 or"),
        ({"rows": torch.zeros(4, 3).T}, "rows: expected columns one element apart"),
        ({"rows": torch.zeros(3, 4, requires_grad=True)}, "rows: .* that autograd"),
        ({"gram": zeros(3, 4)}, r"gram: expected shape \[3, 3\], got shape \[3, 4\]"),
        ({"gram": zeros(3, 3).float()}, "gram: expected dtype torch.float64"),
        ({"gram": zeros(3, 3).T}, "gram: expected columns one element apart"),
        ({"gram": zeros(1, 3).expand(3, 3)}, "gram: expected columns one element apart"),
        ({"gram": zeros(3, 3).to("meta")}, "gram: expected device cpu"),
    ],
)
def test_bad_input_of_a_symmetric_update_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"gram": zeros(3, 3), "rows": torch.zeros(3, 4), **changes}
    with pytest.raises(ValueError, match=message):
        symmetric_update_(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(2)}, r"a: expected shape \[M, K\]"),
        ({"b": torch.zeros(3, 5)}, r"b: expected shape \[N, 4\] as a"),
        ({"b": zeros(3, 4)}, "b: expected dtype torch.float32 as a"),
        ({"b": torch.zeros(3, 4, device="meta")}, "b: expected device cpu as a"),
        ({"b": torch.zeros(4, 3).T}, "b: expected columns one element apart"),
        ({"out": zeros(3, 2)}, r"out: expected shape \[2, 3\]"),
    ],
)
def test_bad_input_of_a_cross_update_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"out": zeros(2, 3), "a": torch.zeros(2, 4), "b": torch.zeros(3, 4), **changes}
    with pytest.raises(ValueError, match=message):
        cross_update_(**arguments)


def test_overlapping_tensors_are_refused() -> None:
    memory = zeros(30)
    with pytest.raises(ValueError, match="gram: expected memory of its own, apart from rows"):
        symmetric_update_(memory[:9].view(3, 3), memory[8:20].view(3, 4))
    with pytest.raises(ValueError, match="out: expected memory of its own, apart from b"):
        cross_update_(memory[:9].view(3, 3), zeros(3, 4), memory[8:20].view(3, 4))
    symmetric_update_(memory[:9].view(3, 3), memory[9:21].view(3, 4))  # neighbors are no overlap


def test_the_family_is_registered() -> None:
    assert FAMILY in backend.families()
    assert backend.backend_for(FAMILY, "cpu") == "cpp"
