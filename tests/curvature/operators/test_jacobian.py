"""Jacobian products against the dense matrix by torch.func.jacrev, in float64."""

import pytest
import torch
from cases import CASES, Case, by_name, relative_error
from torch import Tensor, nn
from torch.func import jacrev

from entropic_fast._torch.full_precision import full_precision
from entropic_fast.curvature import GGNOperator, JacobianOperator, autograd_only
from entropic_fast.objective import Objective

# What goes by autograd: control flow that depends on the data; torch's own recurrent kernel.
BY_AUTOGRAD = {"data-dependent branch"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense(obj: Objective, theta: Tensor | None = None) -> Tensor:
    """One batch after another, all outputs.  # [M, P]"""
    theta = obj.point(theta)
    with full_precision():
        rows = [
            jacrev(lambda t, x=batch.inputs: obj.outputs(t, x))(theta) for batch in obj.batches()
        ]
    return torch.cat([part.reshape(-1, obj.num_params) for part in rows])


def assert_that_of_jacrev(obj: Objective, theta: Tensor | None = None) -> None:
    expected = dense(obj, theta).detach()
    m, p = expected.shape
    jacobian = JacobianOperator(obj, theta)
    assert jacobian.shape == (m, p) and jacobian.T.shape == (p, m) and jacobian.T.T is jacobian
    v, u = randn(p, 9), randn(m, 9)
    for _ in range(2):
        assert relative_error(jacobian @ v, expected @ v) < 1e-12
        assert relative_error(jacobian.T @ u, expected.T @ u) < 1e-12
    assert relative_error(jacobian @ v[:, 0], expected @ v[:, 0]) < 1e-12
    assert relative_error(jacobian.T @ u[:, 0], expected.T @ u[:, 0]) < 1e-12
    assert (jacobian @ v[:, 0]).shape == (m,) and (jacobian.T @ u[:, 0]).shape == (p,)
    assert (jacobian @ v[:, :0]).shape == (m, 0) and (jacobian.T @ u[:, :0]).shape == (p, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_are_those_of_the_dense_matrix(case: Case):
    for examples in (1, 7):
        obj = case.objective(examples)
        assert_that_of_jacrev(obj)
        assert_that_of_jacrev(obj, obj.parameters_vector() * 1.3)
    way = JacobianOperator(obj).method
    assert way == "graph" or case.name in BY_AUTOGRAD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_agree(case: Case):
    obj = case.objective()
    jacobian = JacobianOperator(obj)
    with autograd_only():
        other = JacobianOperator(obj)
    assert other.method == "autograd: switched off by autograd_only"
    v, u = randn(obj.num_params, 2), randn(jacobian.shape[0], 2)
    assert relative_error(other @ v, jacobian @ v) < 1e-12
    assert relative_error(other.T @ u, jacobian.T @ u) < 1e-12


@pytest.mark.parametrize("name", ["residual in place", "attention", "tied weight"])
def test_float32_is_close(name: str):
    expected = dense(by_name(name).objective())
    jacobian = JacobianOperator(by_name(name).objective(dtype=torch.float32))
    m, p = expected.shape
    assert relative_error(jacobian @ torch.eye(p), expected) < 1e-5
    assert relative_error(jacobian.T @ torch.eye(m), expected.T) < 1e-5


class Positions(nn.Module):
    """Outputs [n, 3, 4], of which a part is a constant and a part the inputs."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.conv, self.constant = nn.Conv1d(2, 2, 1), constant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        return torch.cat([h, x[:, :1] * (0 if self.constant else 1)], 1)


@pytest.mark.parametrize("constant", [False, True])
def test_outputs_of_several_dimensions_keep_their_order(constant: bool):
    torch.manual_seed(0)
    loss = lambda outputs, targets: outputs.flatten(1).sum(1)  # noqa: E731
    data = (randn(5, 2, 4), torch.zeros(5))
    obj = Objective(Positions(constant).double(), loss, data, batch_size=2)
    assert_that_of_jacrev(obj)
    outputs = obj.outputs(obj.parameters_vector(), obj.tensors()[0])
    assert JacobianOperator(obj).shape[0] == outputs.numel() == 60


def test_batch_statistics_are_differentiated_through():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = (randn(14, 4), torch.arange(14) % 3)
    assert_that_of_jacrev(Objective(model, "cross_entropy", data, norm="batch", batch_size=9))


def test_many_tiles_give_what_one_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    data = (randn(41, 2, 6, 6), torch.arange(41) % 3)
    obj = Objective(model, "cross_entropy", data)
    small = JacobianOperator(obj, memory_budget=400_000)
    assert small._engine is not None and small._engine.tile < 41
    whole, v, u = JacobianOperator(obj), randn(obj.num_params, 3), randn(123, 3)
    assert relative_error(small @ v, whole @ v) < 1e-13
    assert relative_error(small.T @ u, whole.T @ u) < 1e-13
    assert relative_error(whole @ v, dense(obj) @ v) < 1e-12


def test_the_gauss_newton_matrix_is_made_of_it():
    """With squared errors, 2/N J^T J."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    obj = Objective(model, "mse", (randn(9, 4), randn(9, 1, seed=1)))
    jacobian, v = JacobianOperator(obj), randn(obj.num_params, 2)
    assert relative_error(2 / 9 * (jacobian.T @ (jacobian @ v)), GGNOperator(obj) @ v) < 1e-12


def test_scipy_solves_least_squares_with_it():
    from scipy.sparse.linalg import lsqr

    x, target = randn(12, 4), randn(12)
    obj = Objective(nn.Linear(4, 1, bias=False).double(), "mse", (x, target[:, None]))
    linear = JacobianOperator(obj).to_scipy()
    found = lsqr(linear, target.numpy(), atol=1e-14, btol=1e-14)[0]
    expected = torch.linalg.lstsq(x, target[:, None]).solution[:, 0]
    assert relative_error(torch.from_numpy(found), expected) < 1e-10
    block = randn(4, 3).numpy()
    assert relative_error(torch.from_numpy(linear @ block), x @ torch.from_numpy(block)) < 1e-13
    back = randn(12, 3).numpy()
    assert relative_error(torch.from_numpy(linear.H @ back), x.T @ torch.from_numpy(back)) < 1e-13


def test_products_work_in_compiled_functions():
    obj = by_name("tied weight").objective()
    jacobian, v = JacobianOperator(obj), randn(obj.num_params)
    normal = lambda v: jacobian.T @ (jacobian @ v) * 2  # noqa: E731
    compiled = torch.compile(normal, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v), normal(v))


def test_bad_input_is_refused():
    obj = by_name("raw parameter").objective()
    jacobian = JacobianOperator(obj)
    m, p = jacobian.shape
    for operator, size in ((jacobian, p), (jacobian.T, m)):
        double = torch.float64
        for bad, message in [
            (torch.ones(size + 1, dtype=double), rf"shape \[{size}\] or \[{size}, K\]"),
            (torch.ones(size), r"vectors: expected torch\.float64"),
            (torch.full((size,), float("inf"), dtype=double), "vectors: expected finite"),
        ]:
            with pytest.raises(ValueError, match=message):
                operator @ bad
    with pytest.raises(ValueError, match="obj: expected an Objective"):
        JacobianOperator(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="theta"):
        JacobianOperator(obj, torch.ones(3))
    root = Objective(
        nn.Sequential(nn.Linear(1, 1, bias=False)).double(),
        "mse",
        (torch.zeros(2, 1), torch.zeros(2, 1)),
    )
    root.module.append(_Root())
    with pytest.raises(ValueError, match="expected a finite product"):
        JacobianOperator(root) @ torch.ones(1, dtype=torch.float64)


class _Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_batches_of_other_lengths_have_other_numbers_of_outputs():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    data = [(torch.randint(5, (3, n)), torch.zeros(3)) for n in (7, 4, 7)]
    obj = Objective(model, lambda out, y: out.flatten(1).square().sum(1), data)
    assert dense(obj).shape[0] == 3 * 4 * (7 + 4 + 7)
    assert_that_of_jacrev(obj)
    with autograd_only():
        assert_that_of_jacrev(obj)
