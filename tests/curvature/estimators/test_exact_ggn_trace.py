"""The exact Gauss-Newton trace: against dense matrices, closed forms, and each kind of loss."""

import math

import pytest
import torch
from cases import CASES, Case, by_name
from torch import Tensor, nn

from entropic_fast.curvature import (
    GGNOperator,
    fisher_trace,
    ggn_trace,
    operator_trace,
    with_sampled_labels,
)
from entropic_fast.objective import NonFiniteLossError, Objective

F = nn.functional


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(obj: Objective) -> Tensor:
    """G [P, P], one product a column."""
    return GGNOperator(obj) @ torch.eye(obj.num_params, dtype=obj.dtype)


def by_jacobian(model: nn.Module, loss, inputs: Tensor, targets: Tensor) -> float:
    """Mean over examples of tr(J^T H J), with J from one backward pass an output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    for i in range(len(inputs)):
        outputs = model(inputs[i : i + 1])
        rows = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        out, parameters, retain_graph=True, materialize_grads=True
                    )
                ]
            )
            for out in outputs.flatten()
        ]
        jacobian = torch.stack(rows)
        free = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            loss(free, targets[i : i + 1]).sum(), free, create_graph=True
        )
        columns = [
            torch.autograd.grad(g, free, retain_graph=True)[0].flatten() for g in gradient.flatten()
        ]
        total += float((jacobian.T @ torch.stack(columns) @ jacobian).trace())
    return total / len(inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_trace_of_the_dense_matrix(case: Case):
    obj = case.objective(5)
    expected = dense(obj).trace()
    estimate = ggn_trace(obj)
    assert estimate.value == pytest.approx(float(expected), rel=1e-9)
    assert estimate.samples == 5


@pytest.mark.parametrize("group_by", ["parameter", "module"])
def test_shares_are_those_of_the_diagonal_blocks(group_by: str):
    for name in ("tied weight", "layer norm", "frozen weight"):
        obj = by_name(name).objective()
        diagonal = dense(obj).diagonal()
        expected: dict[str, float] = {}
        for parameter, part in obj.split(diagonal).items():
            key = parameter if group_by == "parameter" else parameter.rpartition(".")[0]
            expected[key] = expected.get(key, 0) + float(part.sum())
        found = ggn_trace(obj, group_by=group_by)
        assert list(found) == list(expected)
        for key, estimate in found.items():
            assert estimate.value == pytest.approx(expected[key], rel=1e-9)


weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "weights": lambda out, y: F.cross_entropy(out, y, weight=weights, reduction="none"),
    "smoothing": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2, reduction="none"),
    "ignored": lambda out, y: F.cross_entropy(out, y, ignore_index=1, reduction="none"),
    "all at once": lambda out, y: F.cross_entropy(
        out, y, weight=weights, label_smoothing=0.1, ignore_index=2, reduction="none"
    ),
    "focal": lambda out, y: (
        (1 - out.softmax(1).gather(1, y[:, None])[:, 0]).square()
        * F.cross_entropy(out, y, reduction="none")
    ),
    "concave": lambda out, y: -out.square().sum(1),
    "both signs": lambda out, y: out[:, 0] * out[:, 1] + out[:, 2].square(),
    "one output": lambda out, y: out[:, 0].exp(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_twice_differentiable_loss(name: str):
    model, inputs, targets = by_name("layer norm").build(9)
    obj = Objective(model, LOSSES[name], (inputs, targets), batch_size=4)
    estimate = ggn_trace(obj)
    expected = by_jacobian(model, LOSSES[name], inputs, targets)
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    assert estimate.value == pytest.approx(float(dense(obj).trace()), rel=1e-9)


def test_losses_linear_or_constant_in_the_outputs_have_none():
    model, inputs, targets = by_name("layer norm").build(6)
    for loss in (lambda out, y: out[:, 0], lambda out, y: out.sum(1) * y):
        estimate = ggn_trace(Objective(model, loss, (inputs, targets)))
        assert (estimate.value, estimate.std_error, estimate.samples) == (0, 0, 6)
    shares = ggn_trace(
        Objective(model, lambda out, y: out[:, 0], (inputs, targets)), group_by="module"
    )
    assert {e.value for e in shares.values()} == {0.0} and len(shares) == 3


def test_probabilities_as_targets():
    model, inputs, _ = by_name("raw parameter").build(6)
    targets = randn(6, 3).softmax(1)
    for dtype in (torch.float64, torch.float32):
        obj = Objective(
            model.to(dtype), "cross_entropy", (inputs.to(dtype), targets.to(dtype)), batch_size=4
        )
        assert ggn_trace(obj).value == pytest.approx(float(dense(obj).trace()), rel=1e-5)


def test_outputs_at_positions():
    """A label for each of 4 positions: outputs [n, C, S], the loss their mean."""
    model = nn.Conv1d(2, 3, 2).double()
    x, y = randn(5, 2, 5), torch.arange(20).view(5, 4) % 3
    obj = Objective(model, "cross_entropy", (x, y), batch_size=2)
    assert ggn_trace(obj).value == pytest.approx(float(dense(obj).trace()), rel=1e-10)


def test_least_squares_has_its_closed_form():
    """(2 / (N K)) sum |x|^2, once for each of K outputs."""
    x, y = randn(11, 4), randn(11, 3)
    obj = Objective(nn.Linear(4, 3, bias=False).double(), "mse", (x, y))
    estimate = ggn_trace(obj)
    each = 2 * x.square().sum(1)
    assert estimate.value == pytest.approx(float(each.mean()))
    assert estimate.std_error == pytest.approx(float(each.std() / 11**0.5))


def test_logistic_regression_has_its_closed_form():
    x, y = randn(9, 4), (randn(9, seed=2) > 0).double()
    obj = Objective(
        nn.Linear(4, 1, bias=False).double(),
        lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y, reduction="none"),
        (x, y),
    )
    p = torch.sigmoid(x @ obj.parameters_vector())
    expected = (p * (1 - p) * x.square().sum(1)).mean()
    assert ggn_trace(obj).value == pytest.approx(float(expected))


def test_softmax_regression_has_its_kronecker_form():
    """Mean of (diag p - p p^T) x x^T: the trace is the mean of (1 - |p|^2) |x|^2."""
    x, y = randn(12, 4), torch.arange(12) % 5
    obj = Objective(nn.Linear(4, 5, bias=False).double(), "cross_entropy", (x, y))
    p = (x @ obj.parameters_vector().view(5, 4).T).softmax(1)
    expected = ((1 - p.square().sum(1)) * x.square().sum(1)).mean()
    assert ggn_trace(obj).value == pytest.approx(float(expected))


def test_confident_examples_keep_their_accuracy_in_float32():
    """p = 1 - 1e-9: 1 - p is 0 in float32, yet the trace is not."""
    x = torch.ones(4, 2)
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[10.0, 10.0], [0.0, 0.0], [-1.0, 0.5]]))
    obj = Objective(model, "cross_entropy", (x, torch.zeros(4).long()))
    p = torch.tensor([20.0, 0.0, -0.5], dtype=torch.float64).softmax(0)
    expected = float((p * (1 - p)).sum()) * 2
    assert ggn_trace(obj).value == pytest.approx(expected, rel=1e-5)
    assert ggn_trace(obj, group_by="parameter")["weight"].value == pytest.approx(expected, rel=1e-5)


def test_labels_drawn_from_the_model_have_it_as_their_mean():
    obj = by_name("attention").objective(9)
    sampled = fisher_trace(with_sampled_labels(obj, draws=400))
    assert abs(ggn_trace(obj).value - sampled.value) < 4 * sampled.std_error


def test_hutchinson_agrees():
    obj = by_name("group norm").objective(9)
    estimate = operator_trace(GGNOperator(obj), 200)
    assert abs(ggn_trace(obj).value - estimate.value) < 4 * estimate.std_error


def test_neither_batches_nor_memory_nor_the_first_examples_matter():
    case = by_name("layer norm")
    whole = ggn_trace(case.objective(11, batch_size=11))
    for size in (1, 4):
        got = ggn_trace(case.objective(11, batch_size=size))
        assert got.value == pytest.approx(whole.value, rel=1e-12)
        assert got.std_error == pytest.approx(whole.std_error, rel=1e-10)
    obj = case.objective(11)
    assert ggn_trace(obj, memory_budget=60_000).value == pytest.approx(whole.value, rel=1e-12)
    model, inputs, targets = case.build(11)
    first = Objective(model, "cross_entropy", (inputs[:5], targets[:5]))
    assert ggn_trace(obj, max_examples=5).value == pytest.approx(ggn_trace(first).value, rel=1e-12)
    loader = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    batched = ggn_trace(Objective(model, "cross_entropy", loader))
    assert batched.value == pytest.approx(whole.value, rel=1e-12)


def test_a_point_other_than_the_models_own():
    case = by_name("tied weight")
    obj = case.objective()
    theta = obj.parameters_vector() * 1.3 - 0.1
    moved = GGNOperator(obj, theta) @ torch.eye(obj.num_params, dtype=torch.float64)
    assert ggn_trace(obj, theta).value == pytest.approx(float(moved.trace()), rel=1e-10)


def test_one_example():
    estimate = ggn_trace(by_name("raw parameter").objective(1))
    assert math.isnan(estimate.std_error) and estimate.samples == 1


def test_half_precision():
    obj = Objective(nn.Linear(4, 3).bfloat16(), "cross_entropy", (randn(9, 4), torch.arange(9) % 3))
    exact = ggn_trace(obj.cast(torch.float64))
    assert ggn_trace(obj).value == pytest.approx(exact.value, rel=0.03)


def test_rank_decides_the_number_of_gradients(monkeypatch: pytest.MonkeyPatch):
    """C - 1 an example for cross-entropy, 1 for a loss that sees one output."""
    from entropic_fast.curvature.estimators.trace import gauss_newton as ggn

    counted: list[int] = []
    original = ggn.gradient_norms

    def counting(obj: Objective, *args, **options):
        counted.append(obj.num_examples)
        return original(obj, *args, **options)

    monkeypatch.setattr(ggn, "gradient_norms", counting)
    model, inputs, targets = by_name("layer norm").build(6)
    ggn_trace(Objective(model, "cross_entropy", (inputs, targets)))
    ggn_trace(Objective(model, LOSSES["one output"], (inputs, targets)))
    ggn_trace(Objective(model, "mse", (inputs, randn(6, 3))))
    assert counted == [12, 6, 18]


def test_bad_input_is_refused():
    obj = by_name("raw parameter").objective(7)
    with pytest.raises(ValueError, match="max_examples: expected at most the 7 examples"):
        ggn_trace(obj, max_examples=8)
    with pytest.raises(ValueError, match="theta"):
        ggn_trace(obj, torch.ones(3))
    with pytest.raises(ValueError, match="by: expected one of"):
        ggn_trace(obj, group_by="layer")
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        ggn_trace(obj, memory_budget=100)
    x = randn(7, 4)
    x[5, 1] = float("inf")
    with pytest.raises(ValueError, match=r"outputs: expected finite values, .* example 5"):
        ggn_trace(Objective(nn.Linear(4, 3).double(), "mse", (x, randn(7, 3)), batch_size=2))
    x, y = randn(7, 3), randn(7, 3)
    y[4, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="example 4"):
        ggn_trace(Objective(nn.Linear(3, 3).double(), "mse", (x, y), batch_size=2))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="depend on that example alone"):
        ggn_trace(Objective(model, "mse", (randn(7, 4), randn(7, 3)), norm="batch"))
    flat = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(flat.weight)
    kinked = Objective(flat, lambda out, y: out[:, 0].abs() ** 1.5, (x, y[:, :1]))
    with pytest.raises(ValueError, match="finite second derivatives in the outputs"):
        ggn_trace(kinked)
