"""Expressions of operators, against the same expressions of dense matrices."""

import inspect
import re

import pytest
import torch
from cases import by_name
from torch import Tensor

import entropic_fast as ef
from entropic_fast.curvature import operator_diagonal, operator_trace
from entropic_fast.ops.random_bits import streams as random


class Foreign:
    """An operator of somebody else: the three members of the protocol, and no more."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


class Transposable(Foreign):
    @property
    def T(self) -> Foreign:
        return Transposable(self.matrix.T)


def symmetric(size: int, seed: int) -> Tensor:
    matrix = random.normal((size, size), seed)
    return (matrix + matrix.T) / 2


def of_model():
    obj = by_name("raw parameter").objective()
    H, G = ef.HessianOperator(obj), ef.GGNOperator(obj)
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    return H, G, H @ eye, G @ eye


def complement(u: Tensor) -> Tensor:
    """The projector onto the orthogonal complement of the columns of u."""
    q = torch.linalg.qr(u)[0]
    return torch.eye(len(u), dtype=u.dtype) - q @ q.T


def expressions() -> dict[str, tuple[ef.LinearOperator, Tensor]]:
    """Operators, and the same computed from dense matrices."""
    H, G, h, g = of_model()
    size = len(h)
    a, u = symmetric(size, 1), random.normal((size, 2), 2)
    across, beside = complement(u), complement(u[:, :1])
    A = Transposable(a)
    return {
        "tensor": (a, a),
        "foreign": (A, a),
        "wrapped": (ef.as_operator(A), a),
        "sum": (H + 0.1 * G, h + 0.1 * g),
        "difference": (H - G, h - g),
        "with a tensor": (H - a, h - a),
        "tensor first": (a + H, a + h),
        "foreign first": (ef.as_operator(A) - H, a - h),
        "multiple": (-(H * 2) / 3, -h * 2 / 3),
        "scalar tensor": (torch.tensor(2.0) * H, 2 * h),
        "projected": (H.projected(u), across @ h @ across),
        "projected along a vector": (G.projected(u[:, 0]), beside @ g @ beside),
        "projected sum": ((H + A).projected(u), across @ (h + a) @ across),
        "nested": (
            2 * (H + A).projected(u) - 0.5 * (G - H),
            2 * across @ (h + a) @ across - (g - h) / 2,
        ),
    }


NAMES = list(expressions())


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[ef.LinearOperator, Tensor]]:
    return expressions()


def close(got: Tensor, expected: Tensor, rtol: float = 1e-12) -> bool:
    return float((got - expected).norm()) <= rtol * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("name", NAMES)
def test_products_and_forms_are_those_of_the_matrix(cases, name: str):
    operator, matrix = ef.as_operator(cases[name][0]), cases[name][1]
    for k in (0, 1, 2, 5):
        vectors = random.normal((len(matrix), k), 10 + k)
        assert close(operator @ vectors, matrix @ vectors)
        assert close(operator.unchecked(vectors), matrix @ vectors)
        assert close(operator.T @ vectors, matrix.T @ vectors)
        forms = operator.quadratic_forms(vectors)
        assert forms.shape == (k,) and close(forms, (vectors * (matrix @ vectors)).sum(0))
    assert close(operator @ vectors[:, 0], matrix @ vectors[:, 0])
    assert close(torch.as_tensor(operator.to_scipy() @ vectors.numpy()), matrix @ vectors)


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_takes_it(cases, name: str):
    operator, matrix = cases[name]
    values, size = torch.linalg.eigvalsh(matrix), len(matrix)
    assert close(ef.top_eigenvalues(operator, 3, 1e-9).values, values.flip(0)[:3], 1e-8)
    density = ef.spectral_density(operator, ef.DensitySettings(size, size))
    assert close(density.nodes.flatten().sort().values, values, 1e-9)
    shifted = ef.as_operator(operator) + (1 - float(values[0])) * torch.eye(size).double()
    expected = (values + 1 - values[0]).log().sum()
    assert abs(float(ef.log_determinant(shifted, k=size)) - expected) < 1e-8 * size
    for method in ("hutch++", "xtrace"):
        estimate = operator_trace(operator, 2 * size, method=method)
        assert abs(estimate.value - matrix.trace()) < 1e-9 * max(1.0, float(matrix.norm()))
    units = ef.Eigenpairs(values, torch.eye(size).double(), values, 0, False)
    assert close(operator_diagonal(operator, 3, deflate=units).value, matrix.diagonal(), 1e-10)


def test_expressions_of_jacobians_are_rectangular():
    obj = by_name("raw parameter").objective()
    J = ef.JacobianOperator(obj)
    j = J @ torch.eye(obj.num_params, dtype=torch.float64)
    K = 2 * J - 0.5 * J
    assert K.shape == J.shape == tuple(j.shape)
    u = random.normal((len(j), 3), 0)
    assert close(K.T @ u, 1.5 * j.T @ u) and J.T.T is J


def test_what_is_no_operand_is_rejected():
    H, _, h, _ = of_model()
    with pytest.raises(ValueError, match=re.escape(f"expected a term of shape {list(h.shape)}")):
        H + torch.eye(len(h) + 1).double()
    with pytest.raises(ValueError, match=r"got shape .* torch\.float32"):
        H - h.float()
    with pytest.raises(ValueError, match="expected something with shape, dtype and @"):
        H + 3
    with pytest.raises(TypeError):
        H * h
    with pytest.raises(ValueError, match=r"directions: expected a tensor \[\d+\] or"):
        H.projected(torch.ones(len(h) + 1))
    with pytest.raises(ValueError, match="independent directions"):
        H.projected(torch.zeros(len(h)).double())
    with pytest.raises(ValueError, match="one with a transpose"):
        ef.as_operator(Foreign(h)).T @ h


def test_a_sum_of_finite_products_that_overflows_is_rejected():
    huge = torch.diag(torch.full((3,), 3e38))
    with pytest.raises(ValueError, match="finite products"):
        (ef.as_operator(huge) + huge) @ torch.ones(3)
    with pytest.raises(ValueError, match=r"a product of shape \[3, 2\]"):
        ef.as_operator(type("Wrong", (Foreign,), {"__matmul__": lambda self, v: v[:1]})(huge)) @ (
            torch.ones(3, 2)
        )


def test_the_difference_at_one_point_uses_the_graph_alone():
    H, G, h, _ = of_model()
    vectors = random.normal((len(h), 3), 3)
    difference = H - G
    difference.quadratic_forms(vectors)
    assert H.products + G.products == 2 * len(h)  # those of `of_model`
    elsewhere = ef.GGNOperator(G.obj, G.theta + 0.1)
    got = (H - elsewhere).quadratic_forms(vectors)
    assert close(got, H.quadratic_forms(vectors) - elsewhere.quadratic_forms(vectors))
    assert not close(got, difference.quadratic_forms(vectors), 1e-6)


def test_a_product_reaches_the_engine_in_three_calls(monkeypatch: pytest.MonkeyPatch):
    H, *_ = of_model()
    depths, products = [], H._engine.products

    def counted(*arguments):
        names = [f.frame.f_globals.get("__name__", "") for f in inspect.stack()]
        depths.append(sum(name.startswith("entropic_fast.") for name in names))
        return products(*arguments)

    monkeypatch.setattr(H._engine, "products", counted)
    H @ H.theta
    assert depths == [3]
