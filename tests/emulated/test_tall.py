"""Tall factorizations and factors of a loss's Hessian as a GPU has them, against Householder's."""

from __future__ import annotations

import emulated_gpu
import pytest
import torch
from tolerances import relative_norm
from torch import Tensor, nn

import entropic_fast as ef
from entropic_fast._torch import tall_qr as tall
from entropic_fast._utils import workspace as scratch
from entropic_fast.curvature.estimators import _block_lanczos as krylov
from entropic_fast.curvature.estimators.trace import _output_factors as ggn

DEVICE = "emulated:0"


def tall_matrix(rows: int, columns: int, condition: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator).double())
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double())
    lengths = torch.logspace(0, -torch.tensor(condition).log10().item(), columns).double()
    return (left * lengths @ right).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("columns", [1, 2, 7])
def test_a_tall_matrix_is_q_times_r(
    columns: int, condition: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    matrix = tall_matrix(257, columns, condition, dtype)
    monkeypatch.setattr(scratch, "GPU", scratch.GPU._replace(tall=100))  # three parts
    found = tall.cholesky_qr(matrix.to(DEVICE))
    q, triangle, holds = (part.cpu() for part in found)
    eps = torch.finfo(dtype).eps
    assert bool(holds) and q.dtype == triangle.dtype == dtype
    identity = torch.eye(columns, dtype=torch.float64)
    assert float((q.double().T @ q.double() - identity).abs().max()) < 8 * eps
    assert relative_norm(q.double() @ triangle.double(), matrix) < 8 * eps
    assert torch.equal(triangle, triangle.triu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependent_columns_are_left_to_householder(dtype: torch.dtype):
    full = tall_matrix(60, 3, 2.0, dtype)
    dependent = {
        "zeros": torch.zeros(60, 2, dtype=dtype),
        "twice": torch.cat([full, full[:, :1]], 1),
        "nearly": tall_matrix(60, 4, 1e12, torch.float64).to(dtype),
        "wide": full[:2],
    }
    for matrix in dependent.values():
        on_device = matrix.to(DEVICE)
        q, triangle, holds = tall.cholesky_qr(on_device)
        if not bool(holds):
            assert not bool(q.any()) and not bool(triangle.any())
        q, triangle = (part.cpu().double() for part in tall.qr(on_device))
        assert relative_norm(q @ triangle, matrix) < 1e2 * torch.finfo(dtype).eps
        identity = torch.eye(q.shape[1], dtype=torch.float64)
        assert float((q.T @ q - identity).abs().max()) < 1e2 * torch.finfo(dtype).eps
    q, triangle = tall.qr(full.to(DEVICE)[:, :0])
    assert q.shape == (60, 0) and triangle.shape == (0, 0)
    assert not bool(tall.cholesky_qr(full.to(DEVICE) * float("nan"))[2])


def test_a_factorization_waits_for_nothing():
    matrix = tall_matrix(300, 4, 10.0, torch.float32).to(DEVICE)
    with emulated_gpu.counted() as seen:
        tall.cholesky_qr(matrix)
    assert seen.synchronizations == seen.copies == 0


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (torch.linspace(-1, 1, 150).double(), 3),
        (torch.cat([torch.zeros(60), torch.tensor([1.0, 2.0, 3.0])]).double(), 7),
        (torch.ones(40).double(), 5),
        (torch.zeros(40).double(), 3),
        (torch.linspace(0, 1, 11).double(), 11),
        (torch.tensor([2.0]).double(), 1),
    ],
)
@pytest.mark.parametrize("block", [1, None])
def test_searches_whose_spaces_are_exhausted(values: Tensor, k: int, block: int | None):
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double())
    matrix = (turn * values @ turn.T).to(DEVICE)
    assert krylov.stride_of(matrix.device) > 1
    found = ef.top_eigenvalues((matrix + matrix.T) / 2, k, tol=1e-6, block=block)
    expected = values.sort(descending=True).values[:k]
    assert found.converged and torch.allclose(found.values.cpu(), expected, atol=1e-9)
    vectors = found.vectors.cpu()
    assert torch.allclose(vectors.T @ vectors, torch.eye(k).double(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_classes_have_factors_in_closed_form(dtype: torch.dtype):
    """The trace is that of the eigenvectors, for unsure and for certain examples alike."""
    generator = torch.Generator().manual_seed(0)
    classes = ggn.SMALL + 5
    for scale in (1.0, 30.0):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Linear(6, classes).to(dtype)
        with torch.no_grad():
            model.weight.mul_(scale)
        data = (
            torch.randn(9, 6, generator=generator),
            torch.randint(classes, (9,), generator=generator),
        )
        on_cpu, on_gpu = (
            ef.Objective(model, "cross_entropy", data, device=d) for d in ("cpu", DEVICE)
        )
        expected, found = ef.ggn_trace(on_cpu), ef.ggn_trace(on_gpu)
        limit = 1e-5 if dtype == torch.float32 else 1e-12
        assert found.value == pytest.approx(expected.value, rel=limit)
        assert found.std_error == pytest.approx(expected.std_error, rel=limit)


def test_factors_multiply_to_the_hessian_of_the_loss():
    outputs = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    outputs[3, 7] += 35  # all others together have a probability of 1e-14
    p = outputs.softmax(1)
    found = ggn._class_factors(outputs)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert torch.allclose(found.transpose(1, 2) @ found, expected, atol=1e-15)
    lengths = found.square().sum(2)
    assert torch.equal(lengths, lengths.sort(1, descending=True).values)
    rest = torch.cat([outputs[3, :7], outputs[3, 8:]]).logsumexp(0) - outputs[3].logsumexp(0)
    # The trace of a certain example, sum_k p_k (1 - p_k), to all digits.
    others = torch.cat([p[3, :7], p[3, 8:]])
    trace = p[3, 7] * rest.exp() + (others * (1 - others)).sum()
    assert float(lengths[3].sum()) == pytest.approx(float(trace), rel=1e-12)


WEIGHTS = torch.linspace(-0.5, 2, ggn.SMALL + 5)  # a negative one bends the loss downwards
LOSSES = {
    "cross_entropy": "cross_entropy",
    "weighted": nn.CrossEntropyLoss(WEIGHTS, ignore_index=3, reduction="none"),
    "smoothed": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2, reduction="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("loss", "soft"),
    [
        ("cross_entropy", False), ("cross_entropy", True), ("weighted", False),
        ("smoothed", False), ("smoothed", True),
    ],
)  # fmt: skip
def test_factors_of_weighted_targets_multiply_to_each_hessian(
    loss: str, soft: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(7, 6, generator=generator).to(dtype), len(WEIGHTS)
    y = torch.tensor([0, 3, 5, 36, 20, 3, 1])  # two may be ignored
    if soft:
        y = torch.rand(7, classes, generator=generator).double().softmax(1).to(dtype)
    model = nn.Linear(6, classes).to(dtype)
    obj = ef.Objective(model, LOSSES[loss], (x, y), device=DEVICE)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    batch = next(iter(obj.batches()))
    directions, signs = (t.cpu() for t in ggn.output_factors(obj, obj.parameters_vector(), batch))
    found = torch.einsum(
        "nrk,nr,nrl->nkl", directions.double(), signs.double(), directions.double()
    )
    outputs, y = model(x).detach().double(), y.double() if soft else y
    for i in range(7):
        expected = torch.autograd.functional.hessian(
            lambda z, i=i: obj.loss_fn(z[None], y[i : i + 1]).sum(), outputs[i]
        )
        assert torch.allclose(found[i], expected, atol=1e-6 if dtype == torch.float32 else 1e-12)
