"""Operators that were used can be copied and pickled; what they count."""

import copy
import pickle

import pytest
import torch
from torch import nn

from entropic_fast.curvature import GGNOperator, HessianOperator, JacobianOperator, autograd_only
from entropic_fast.objective import Objective


def objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = (torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3)
    return Objective(model, "cross_entropy", data)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))])
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, JacobianOperator])
def test_a_used_operator_can_be_copied_and_pickled(operator, copied):
    one = operator(objective())
    v = torch.linspace(-1, 1, one.shape[1], dtype=torch.float64)
    product = one @ v
    for _ in range(2):  # values are kept
        one @ v
    other = copied(one)
    assert torch.equal(other @ v, product) and other.method == one.method == "graph"
    if operator is JacobianOperator:
        assert other.T.T is other and torch.equal(other.T @ product, one.T @ product)
    with autograd_only():
        slow = operator(objective())
    assert copied(slow).method == slow.method == copied(slow).method


def test_products_behind_quadratic_forms_are_counted():
    vectors = torch.ones(43, 3, dtype=torch.float64)
    H, G = HessianOperator(objective()), GGNOperator(objective())
    with autograd_only():
        slow = HessianOperator(objective())
    for operator in (H, G, slow):
        operator.quadratic_forms(vectors)
    assert [A.products for A in (H, G, slow)] == [0, 3, 3]


def test_a_transposed_jacobian_is_known_to_scipy():
    J = JacobianOperator(objective())
    linear, u = J.T.to_scipy(), torch.ones(27, dtype=torch.float64)
    assert linear.shape == (43, 27)
    assert torch.equal(torch.from_numpy(linear @ u.numpy()), J.T @ u)
    assert torch.equal(torch.from_numpy(linear.T @ (J.T @ u).numpy()), J @ (J.T @ u))
