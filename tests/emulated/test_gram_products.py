"""Gram products on a GPU: which arithmetic, and the reference's large temporaries."""

from __future__ import annotations

import emulated_gpu
import pytest
import torch
from tolerances import relative_norm
from torch import Tensor

from entropic_fast._torch import memory_budget as memory
from entropic_fast._utils import workspace as scratch
from entropic_fast.ops import backend
from entropic_fast.ops import gram_update as ops
from entropic_fast.ops.gram_update import cross_update_, reference, symmetric_update_
from entropic_fast.ops.gram_update.checks import SymmetricUpdate

DEVICE = torch.device("emulated:0")
KINDS = [(torch.float32, False), (torch.float32, True), (torch.float64, False)]


def rows_of(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(count + columns)
    return torch.randn(count, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("columns", [0, 1, 255, 256, 257, 1500])
@pytest.mark.parametrize("count", [0, 1, 5, 23])
@pytest.mark.parametrize(("dtype", "double"), KINDS)
def test_updates_are_the_products(
    count: int, columns: int, dtype: torch.dtype, double: bool, monkeypatch: pytest.MonkeyPatch
):
    rows, others = rows_of(count, columns, dtype), rows_of(7, columns, dtype)
    square = rows.double() @ rows.double().T
    across = others.double() @ rows.double().T
    limit = 1e-12 if double or dtype == torch.float64 else 2e-6
    for size, block in ((scratch.GPU.gram, 512), (20_000, 4), (100, 1)):
        monkeypatch.setattr(scratch, "GPU", scratch.GPU._replace(gram=size))
        monkeypatch.setattr(reference, "GPU_ROWS", block)
        start = rows_of(count, count, torch.float64)
        gram, out = start.to(DEVICE), torch.ones(7, count).double().to(DEVICE)
        symmetric_update_(gram, rows.to(DEVICE), double_products=double)
        cross_update_(out, others.to(DEVICE), rows.to(DEVICE), double_products=double)
        assert torch.equal(gram.cpu().triu(1), start.triu(1))
        assert relative_norm((gram.cpu() - start).tril(), square.tril()) < limit
        assert relative_norm(out.cpu() - 1, across) < limit


def test_float32_sums_stay_short_and_launches_few():
    """Blocks of 256 columns are added in float64: the error falls with their number."""
    rows = rows_of(24, 65_536, torch.float32).abs_()
    exact = rows.double() @ rows.double().T
    gram, on_device = torch.zeros(24, 24).double().to(DEVICE), rows.to(DEVICE)
    reference.symmetric_update_(SymmetricUpdate(gram, on_device, False))
    norms = exact.diagonal().sqrt()
    error = ((gram.cpu() - exact).tril().abs() / (norms[:, None] * norms)).max()
    assert float(error) <= 8 * 2.0**-23 / (65_536 / 256) ** 0.5
    with emulated_gpu.counted() as seen:
        reference.symmetric_update_(SymmetricUpdate(gram, on_device, False))
    assert seen.launches <= 6 and seen.synchronizations == 0


def test_gpus_with_float64_tensor_cores_multiply_by_cublas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "backend_for", lambda family, device: "triton")
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(ops, "compute_capability", lambda device, c=capability: c)
        assert ops.chosen_backend(DEVICE, double=True) == "reference"
        assert ops.chosen_backend(DEVICE, double=False) == "triton"
    for capability in ((7, 0), (8, 6), (8, 9), (10, 3), (12, 0)):
        monkeypatch.setattr(ops, "compute_capability", lambda device, c=capability: c)
        assert ops.chosen_backend(DEVICE, double=True) == "triton"
    monkeypatch.setattr(ops, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "setting_for", lambda device: "triton")  # asked for by name
    assert ops.chosen_backend(DEVICE, double=True) == "triton"
    assert ops.chosen_backend(torch.device("cpu"), double=True) == "triton"


def test_the_backend_that_is_asked_for_runs():
    backend.set_backend("reference")
    try:
        gram = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
        symmetric_update_(gram, torch.eye(2, device=DEVICE))
        assert torch.equal(gram.cpu(), torch.eye(2).double())
    finally:
        backend.set_backend(None)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1001])
def test_rows_of_a_gpu_begin_at_multiples_of_16_numbers(width: int):
    rows = memory.padded_rows(torch.zeros(1, device=DEVICE), 3, width, torch.float64)
    assert rows.shape == (3, width) and rows.stride(0) % 16 == 0 and rows.dtype == torch.float64
    assert rows.stride(0) < width + 16
    plain = memory.padded_rows(torch.zeros(1), 3, width)
    assert plain.is_contiguous() and plain.dtype == torch.float32
