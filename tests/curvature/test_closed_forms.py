"""Products, forms, traces, eigenvalues and densities against formulas, without any autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional

from entropic_fast.curvature import (
    DensitySettings,
    GGNOperator,
    HessianOperator,
    ggn_trace,
    hessian_diagonal,
    hessian_trace,
    spectral_density,
    top_eigenvalues,
)
from entropic_fast.objective import Objective

N, D, C = 23, 4, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(out: int) -> nn.Module:
    model = nn.Linear(D, out, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(randn(out, D, seed=5))
    return model


@dataclass
class Form:
    """An objective, and its Hessian (and Gauss-Newton matrix, the model being linear)."""

    obj: Objective
    matrix: Tensor


def least_squares() -> Form:
    """Mean squared errors of one output: 2/N X^T X."""
    x = randn(N, D)
    return Form(Objective(linear(1), "mse", (x, randn(N, 1, seed=1))), 2 / N * x.T @ x)


def logistic() -> Form:
    """1/N sum p (1 - p) x x^T."""
    x, y = randn(N, D), (randn(N, seed=1) > 0).double()
    loss = nn.BCEWithLogitsLoss(reduction="none")
    obj = Objective(linear(1), lambda out, t: loss(out[:, 0], t), (x, y))
    p = torch.sigmoid(x @ obj.parameters_vector())
    return Form(obj, x.T @ (x * (p * (1 - p))[:, None]) / N)


def softmax(
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy", weights: Tensor | None = None
) -> Form:
    """1/N sum_n weight_n (diag p - p p^T) (x) x x^T, whatever the labels are."""
    x, y = randn(N, D), torch.arange(N) % C
    obj = Objective(linear(C), loss, (x, y))
    p = (x @ obj.parameters_vector().view(C, D).T).softmax(1)
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    total = torch.zeros(C * D, C * D, dtype=torch.float64)
    for q, v, weight in zip(p, x, weights, strict=True):
        total += weight * torch.kron(torch.diag(q) - q[:, None] * q, v[:, None] * v)
    return Form(obj, total / N)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
LABELS = torch.arange(N) % C


def cross_entropy(**options) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, y: functional.cross_entropy(out, y, reduction="none", **options)


def smoothed_and_weighted() -> Form:
    """With smoothing s an example weighs (1 - s) w_y + s/C sum w: torch weighs each class's
    part of the target by the class's weight."""
    weights = 0.8 * CLASS_WEIGHTS[LABELS] + 0.2 / C * CLASS_WEIGHTS.sum()
    return softmax(cross_entropy(weight=CLASS_WEIGHTS, label_smoothing=0.2), weights)


FORMS = {
    "least squares": least_squares,
    "logistic": logistic,
    "softmax": softmax,
    "softmax, class weights": lambda: softmax(
        cross_entropy(weight=CLASS_WEIGHTS), CLASS_WEIGHTS[LABELS]
    ),
    "softmax, label smoothing": lambda: softmax(cross_entropy(label_smoothing=0.3)),
    "softmax, ignored index": lambda: softmax(
        cross_entropy(ignore_index=2), (LABELS != 2).double()
    ),
    "softmax, smoothed and weighted": smoothed_and_weighted,
}
forms = pytest.mark.parametrize("name", FORMS)
operators = pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])


@forms
@operators
def test_products_and_forms(name: str, operator: type):
    form = FORMS[name]()
    product, vectors = operator(form.obj), randn(len(form.matrix), 9, seed=2)
    assert product.method == "graph"
    assert relative_error(product @ vectors, form.matrix @ vectors) < 1e-13
    expected = (vectors * (form.matrix @ vectors)).sum(0)
    assert relative_error(product.quadratic_forms(vectors), expected) < 1e-13


@forms
def test_traces_and_diagonals(name: str):
    form = FORMS[name]()
    trace = float(form.matrix.trace())
    assert ggn_trace(form.obj).value == pytest.approx(trace, rel=1e-12)
    estimate = hessian_trace(form.obj, probes=256, seed=1)
    assert abs(estimate.value - trace) <= 5 * estimate.std_error + 1e-12 * trace
    diagonal = hessian_diagonal(form.obj, probes=512, seed=1)
    gap = (diagonal.value - form.matrix.diagonal()).abs()
    assert bool((gap <= 6 * diagonal.std_error + 1e-12 * trace).all())


@forms
@operators
def test_eigenvalues(name: str, operator: type):
    form = FORMS[name]()
    pairs = top_eigenvalues(operator(form.obj), 3, tol=1e-10)
    expected = torch.linalg.eigvalsh(form.matrix).flip(0)[:3]
    assert relative_error(pairs.values, expected) < 1e-9
    residuals = form.matrix @ pairs.vectors - pairs.vectors * pairs.values
    assert float(residuals.norm()) < 1e-8 * float(expected[0])


@forms
def test_densities_have_the_moments_of_the_matrix(name: str):
    form = FORMS[name]()
    density = spectral_density(
        HessianOperator(form.obj), DensitySettings(probes=200, steps=20), seed=1
    )
    for power in (1, 2):
        found = density.trace(lambda nodes, power=power: nodes**power)
        expected = float(torch.linalg.matrix_power(form.matrix, power).trace())
        assert abs(found.value - expected) <= 5 * found.std_error + 1e-10 * expected


def test_least_squares_on_normal_data_follow_marchenko_and_pastur():
    """The spectrum of 2/N X^T X, of N rows of P normal numbers, with ratio P / N = 1/2."""
    p, n = 300, 600
    x = randn(n, p, seed=3)
    obj = Objective(nn.Linear(p, 1, bias=False).double(), "mse", (x, torch.zeros(n, 1)))
    ratio = p / n
    low, high = 2 * (1 - ratio**0.5) ** 2, 2 * (1 + ratio**0.5) ** 2
    grid = torch.linspace(0, 1.3 * high, 400, dtype=torch.float64)
    density = spectral_density(
        HessianOperator(obj), DensitySettings(probes=32, steps=60, sigma=0.15, grid=grid)
    )
    fine = torch.linspace(low, high, 4001, dtype=torch.float64)
    law = ((high - fine) * (fine - low)).clamp(min=0).sqrt() / (4 * torch.pi * ratio * fine)
    kernel = torch.exp(-(((grid[:, None] - fine) / 0.15) ** 2) / 2) / (0.15 * (2 * torch.pi) ** 0.5)
    smoothed = torch.trapezoid(kernel * law, fine, dim=1)
    assert float(torch.trapezoid(law, fine)) == pytest.approx(1, abs=1e-3)
    values = torch.linalg.eigvalsh(2 / n * x.T @ x)
    each = torch.exp(-(((grid[:, None] - values) / 0.15) ** 2) / 2)
    exact = each.mean(1) / (0.15 * (2 * torch.pi) ** 0.5)
    peak = float(smoothed.max())
    assert float((exact - smoothed).abs().max()) < 0.03 * peak  # of one matrix of finite size
    assert bool(((density.density - exact).abs() <= 5 * density.std_error + 1e-6 * peak).all())
    top = float(top_eigenvalues(HessianOperator(obj), 1).values[0])
    assert top == pytest.approx(high, rel=0.05)
