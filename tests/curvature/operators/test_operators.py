"""Hessian and Gauss-Newton products against dense matrices in float64 and closed forms."""

import gc

import numpy as np
import pytest
import torch
from cases import CASES, Case, by_name, difference_hessian, relative_error
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from entropic_fast.curvature import GGNOperator, HessianOperator, autograd_only
from entropic_fast.objective import NonFiniteLossError, Objective

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def identity(obj: Objective) -> Tensor:
    return torch.eye(obj.num_params, dtype=obj.dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_ggn(obj: Objective) -> Tensor:
    """sum_n J_n^T (diag p - p p^T) J_n / N, with J one backward pass an output.  # [P, P]"""
    total = torch.zeros(obj.num_params, obj.num_params, dtype=obj.dtype)
    for _, inputs, _ in obj.batches(batch_size=1):
        theta = obj.parameters_vector().requires_grad_()
        outputs = obj.outputs(theta, inputs)[0]
        rows = [torch.autograd.grad(z, theta, retain_graph=True)[0] for z in outputs]
        p, jacobian = outputs.softmax(0).detach(), torch.stack(rows)
        total += jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian
    return total / obj.num_examples


@all_cases
def test_hessian_is_that_of_central_differences(case: Case):
    expected = difference_hessian(case)
    for dtype in case.double_backward_in:
        obj = case.objective(dtype=dtype)
        assert relative_error(HessianOperator(obj) @ identity(obj), expected) < TOLERANCE[dtype]


@all_cases
def test_hessian_is_symmetric(case: Case):
    obj = case.objective()
    matrix = HessianOperator(obj) @ identity(obj)
    assert relative_error(matrix, matrix.T) < 1e-13


@all_cases
def test_gauss_newton_is_that_of_the_jacobian(case: Case):
    obj = case.objective()
    got = GGNOperator(obj) @ identity(obj)
    assert relative_error(got, dense_ggn(obj)) < 1e-12
    assert float(torch.linalg.eigvalsh(got).min()) > -1e-12 * float(got.norm())


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_least_squares_has_its_closed_form(operator):
    x = randn(13, 4)
    obj = Objective(nn.Linear(4, 1, bias=False).double(), "mse", (x, randn(13, 1, seed=1)))
    assert torch.allclose(operator(obj) @ identity(obj), 2 / 13 * x.T @ x, atol=1e-14)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_logistic_regression_has_its_closed_form(operator):
    x, y = randn(13, 4), (randn(13, seed=1) > 0).double()
    loss = nn.BCEWithLogitsLoss(reduction="none")
    obj = Objective(nn.Linear(4, 1, bias=False).double(), lambda out, t: loss(out[:, 0], t), (x, y))
    p = torch.sigmoid(x @ obj.parameters_vector())
    expected = x.T @ (x * (p * (1 - p))[:, None]) / 13
    assert torch.allclose(operator(obj) @ identity(obj), expected, atol=1e-14)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_softmax_regression_has_its_kronecker_form(operator):
    x = randn(11, 3)
    y = torch.arange(11) % 4
    obj = Objective(nn.Linear(3, 4, bias=False).double(), "cross_entropy", (x, y))
    p = (x @ obj.parameters_vector().view(4, 3).T).softmax(1)
    expected = sum(
        torch.kron(torch.diag(q) - q[:, None] * q, v[:, None] * v)
        for q, v in zip(p, x, strict=True)
    )
    assert torch.allclose(operator(obj) @ identity(obj), expected / 11, atol=1e-14)


def test_soft_labels_and_dense_outputs():
    """Cross-entropy of probabilities, and of a class for each position."""
    soft = Objective(
        nn.Linear(3, 4).double(), "cross_entropy", (randn(5, 3), randn(5, 4, seed=1).softmax(1))
    )
    dense = Objective(
        nn.Conv1d(2, 3, 1).double(),
        "cross_entropy",
        (randn(5, 2, 6), torch.arange(30).view(5, 6) % 3),
    )
    for obj in (soft, dense):  # linear models: the two matrices agree
        matrix = HessianOperator(obj) @ identity(obj)
        assert torch.allclose(matrix, GGNOperator(obj) @ identity(obj), atol=1e-14)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_a_short_last_batch_weighs_what_it_holds(operator):
    case = by_name("group norm")
    v = randn(case.objective().num_params)
    ragged, whole = (operator(case.objective(33, batch_size=b)) @ v for b in (32, 33))
    assert torch.allclose(ragged, whole, atol=1e-14)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_a_block_is_its_columns(operator):
    product = operator(by_name("transformer layer").objective())
    block = randn(product.shape[0], 5)
    columns = torch.stack([product @ column for column in block.T], 1)
    assert torch.allclose(product @ block, columns, atol=1e-14)
    assert torch.allclose(product @ block[:, :1], columns[:, :1], atol=1e-14)
    assert torch.allclose(product @ block.T.contiguous().T, columns, atol=1e-14)
    assert (product @ block[:, :0]).shape == (product.shape[0], 0)
    assert product.products == 5 + 5 + 1 + 5


def test_batch_statistics_are_differentiated_through():
    def gradient(theta: Tensor) -> Tensor:
        return obj.gradient(theta)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = (randn(14, 4), torch.arange(14) % 3)
    obj = Objective(model, "cross_entropy", data, norm="batch", batch_size=9)
    theta, step = obj.parameters_vector(), 1e-5
    columns = [
        (gradient(theta + step * e) - gradient(theta - step * e)) / (2 * step)
        for e in identity(obj)
    ]
    expected = torch.stack(columns, 1)
    assert relative_error(HessianOperator(obj) @ identity(obj), expected) < 1e-8
    running = obj_running = Objective(model, "cross_entropy", data)
    assert relative_error(HessianOperator(running) @ identity(obj_running), expected) > 1e-2


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_a_linear_loss_has_no_curvature(operator):
    obj = Objective(nn.Linear(4, 1).double(), lambda out, y: out[:, 0] * y, (randn(6, 4), randn(6)))
    assert not (operator(obj) @ identity(obj)).any()


def test_gauss_newton_of_a_custom_loss_uses_its_second_derivative():
    x, y = randn(9, 3), randn(9, seed=1)
    obj = Objective(
        nn.Linear(3, 1, bias=False).double(), lambda out, t: (out[:, 0] - t) ** 4, (x, y)
    )
    residual = x @ obj.parameters_vector() - y
    expected = x.T @ (x * (12 * residual**2)[:, None]) / 9
    assert torch.allclose(GGNOperator(obj) @ identity(obj), expected, rtol=1e-12)


def test_padding_row_of_an_embedding_is_a_constant():
    model = nn.Sequential(nn.Embedding(4, 2, padding_idx=0), nn.Flatten(), nn.Linear(4, 3))
    data = (torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.tensor([0, 1, 2]))
    obj = Objective(model.double(), "cross_entropy", data)
    matrix = HessianOperator(obj) @ identity(obj)
    assert torch.allclose(matrix, matrix.T, atol=1e-15)
    assert not matrix[:2].any() and matrix[2:].any()


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_scipy_finds_the_eigenvalues_of_the_dense_matrix(operator):
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        obj = by_name("tied weight").objective(dtype=dtype)
        product = operator(obj)
        linear = product.to_scipy()
        assert linear.shape == (obj.num_params,) * 2
        assert linear.dtype == (np.float32 if dtype == torch.float32 else np.float64)
        dense = torch.linalg.eigvalsh((product @ identity(obj)).double())
        top = eigsh(linear, k=2, which="LA", v0=np.ones(obj.num_params), return_eigenvectors=False)
        assert np.allclose(np.sort(top), dense[-2:].numpy(), rtol=rtol)
        block = np.ones((obj.num_params, 3))
        assert np.allclose(linear @ block, (linear @ block[:, 0])[:, None], atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "data-dependent branch"])
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_nothing_outlives_a_product(operator, name):
    obj = by_name(name).objective()
    product, vectors = operator(obj), randn(obj.num_params, 2)

    def tensors() -> int:
        return sum(type(o) is Tensor for o in gc.get_objects())

    for _ in range(3):  # the third keeps the values that are wanted again
        product @ vectors
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(5):
            product @ vectors
        assert tensors() == before
    finally:
        gc.enable()


def test_the_operator_keeps_its_point():
    obj = by_name("tied weight").objective()
    theta = obj.parameters_vector() + 0.5
    product, v = HessianOperator(obj, theta), randn(obj.num_params)
    before = product @ v
    theta.zero_()
    assert torch.equal(product @ v, before)
    assert not torch.allclose(HessianOperator(obj) @ v, before)


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_bad_input_is_refused(operator):
    obj = by_name("raw parameter").objective()
    product = operator(obj)
    for bad, message in [
        (torch.ones(16, dtype=torch.float64), r"expected a tensor of shape \[17\] or \[17, K\]"),
        (torch.ones(17, 1, 1, dtype=torch.float64), "vectors: expected a tensor of shape"),
        (np.ones(17), "vectors: expected a tensor of shape"),
        (torch.ones(17), r"vectors: expected torch\.float64"),
        (torch.full((17,), float("nan"), dtype=torch.float64), "vectors: expected finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            product @ bad
    with pytest.raises(ValueError, match="obj: expected an Objective"):
        operator(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="theta"):
        operator(obj, torch.ones(3))


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_nan_is_refused_with_its_place(operator):
    x = torch.ones(6, 4)
    x[5, 0] = float("inf")
    obj = Objective(nn.Linear(4, 3), "cross_entropy", (x, torch.zeros(6, dtype=torch.int64)))
    with pytest.raises(NonFiniteLossError, match=r"example 5 at a point of norm"):
        operator(obj) @ torch.ones(15)
    root = Objective(
        nn.Linear(1, 1, bias=False), lambda out, y: out[:, 0].abs() ** 1.5, (x[:1, :1] * 0, x[:1])
    )
    with pytest.raises(ValueError, match="NaN or infinity at a point of norm"):
        operator(root) @ torch.ones(1)


@pytest.mark.parametrize("kind", [GGNOperator, HessianOperator])
def test_one_image_at_a_time_by_autograd_too(kind):
    """torch's batch normalization is wrong for one image whose gradient comes channels last."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Tanh(),
        Positions(), torch.nn.Linear(2, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    together = Objective(model, "mse", (x, y), batch_size=3)
    identity = torch.eye(together.num_params, dtype=torch.float64)
    with autograd_only():
        alone = kind(together.with_data((x, y), batch_size=1)) @ identity
        expected = kind(together) @ identity
    torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kind(together) @ identity, expected, rtol=1e-10, atol=1e-12)


class Positions(torch.nn.Module):
    """Images as the mean of a sequence of positions, whose channels are last."""

    def forward(self, x):  # [N, C, H, W] -> [N, C]
        return torch.tanh(x.flatten(2).transpose(1, 2)).mean(1)
