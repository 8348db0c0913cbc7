"""Models in half precision: what is computed, how exactly, and what is refused."""

import pytest
import torch
from cases import CASES, Case, relative_error
from torch import Tensor, nn

from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    autograd_only,
    curvature_profile,
    fisher_trace,
    gradient_norms,
    hessian_trace,
    score_gram,
    score_matrix,
)
from entropic_fast.dynamics import ProjectedSGD, relax
from entropic_fast.objective import NonFiniteLossError, Objective
from entropic_fast.paths import Path, auto_neb, linear_path, path_losses
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import load
from entropic_fast.training.lmc import measure_line
from entropic_fast.training.models import build

HALF = (torch.float16, torch.bfloat16)
both = pytest.mark.parametrize("dtype", HALF, ids=str)
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def data(n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


def linear(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 3).to(dtype)


@both
@all_cases
def test_losses_and_gradients_are_those_of_the_same_numbers_in_float64(
    case: Case, dtype: torch.dtype
):
    obj = case.objective(dtype=dtype)
    exact = obj.cast(torch.float64)
    eps = torch.finfo(dtype).eps
    losses = obj.example_losses()
    assert obj.dtype == dtype and losses.dtype == torch.float32
    assert relative_error(losses, exact.example_losses()) < eps
    gradient = obj.gradient()
    assert gradient.dtype == dtype
    assert relative_error(gradient, exact.gradient()) < 4 * eps
    loss, accuracy = obj.evaluate()
    assert loss == pytest.approx(obj.loss(), rel=1e-6) and 0 <= accuracy <= 1


@both
@all_cases
def test_scores_are_those_of_the_same_numbers_in_float64(case: Case, dtype: torch.dtype):
    obj = case.objective(dtype=dtype)
    exact = obj.cast(torch.float64)
    eps = torch.finfo(dtype).eps
    norms = gradient_norms(obj)
    assert norms.dtype == torch.float64
    assert relative_error(norms, gradient_norms(exact)) < 4 * eps
    assert relative_error(score_gram(obj), score_gram(exact)) < 4 * eps
    assert fisher_trace(obj).value == pytest.approx(float(norms.mean()), rel=1e-3)


@both
def test_an_rms_norm_of_small_numbers_has_the_eps_that_torch_takes(dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 3)).to(dtype)
    x, y = data()
    obj = Objective(model, "cross_entropy", (x * 0.02, y))
    with autograd_only():
        expected = score_matrix(obj)
    assert relative_error(score_matrix(obj), expected) < 4 * torch.finfo(dtype).eps


@both
def test_a_cross_entropy_is_computed_in_float32(dtype: torch.dtype):
    """Near-certain answers: in half precision the log of 1 - 1e-4 would be 0 or an eps."""
    model = nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.25, 0.0], [0.0, 0.0]]))
    obj = Objective(model, "cross_entropy", (torch.tensor([[1.0, 0.0]]), torch.tensor([0])))
    assert obj.loss() == pytest.approx(9.611e-05, rel=1e-3)
    theta, (inputs, targets) = obj.parameters_vector(), obj.tensors()
    named = obj.losses_with(obj.split(theta), inputs, targets)
    assert named.dtype == torch.float32 and torch.equal(named, obj.losses(theta, inputs, targets))


def test_losses_over_the_largest_float16_are_finite():
    x = torch.full((3, 1), 400.0)
    model = nn.Linear(1, 1, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1.0)
    obj = Objective(model, "mse", (x, 0 * x))
    assert obj.loss() == 160_000.0
    with pytest.raises(ValueError, match=r"gradient: .* within torch\.float16, at most 6.55e\+04"):
        obj.gradient()
    assert obj.cast(torch.float32).gradient().item() == 320_000.0


def test_batches_are_summed_in_float32():
    """4,096 batches with a gradient of 1 each: bfloat16 sums would stay at 256."""
    x = torch.ones(4096, 1)
    model = nn.Linear(1, 1, bias=False).bfloat16()
    obj = Objective(model, lambda out, y: out[:, 0] * y, (x, torch.ones(4096)), batch_size=1)
    assert obj.gradient().item() == 1.0


@both
def test_a_custom_loss_receives_float32_outputs(dtype: torch.dtype):
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return outputs.square().sum(1)

    obj = Objective(linear(dtype), loss, data())
    obj.loss()
    assert set(seen) == {torch.float32}
    assert obj.outputs(obj.parameters_vector(), obj.tensors()[0]).dtype == dtype


@both
def test_soft_labels_in_half_precision_are_probabilities(dtype: torch.dtype):
    x, _ = data()
    soft = torch.rand(9, 3).softmax(1)
    obj = Objective(linear(dtype), "cross_entropy", (x, soft.to(dtype)))
    wide = Objective(linear(dtype).float(), "cross_entropy", (x.to(dtype), soft))
    assert obj.loss() == pytest.approx(wide.loss(), rel=0.02)


@both
def test_points_have_the_models_dtype(dtype: torch.dtype):
    obj = Objective(linear(dtype), "cross_entropy", data())
    theta = obj.parameters_vector()
    assert theta.dtype == dtype and obj.point(theta).dtype == dtype
    assert obj.loss(theta) == obj.loss()
    with pytest.raises(ValueError, match=f"theta: expected {dtype}"):
        obj.loss(theta.float())
    target = linear(dtype, seed=1)
    obj.load_into(target, theta)
    assert torch.equal(target.weight, linear(dtype).weight)


@both
def test_casting_keeps_the_numbers(dtype: torch.dtype):
    obj = Objective(linear(dtype), "cross_entropy", data())
    wide = obj.cast(torch.float32)
    assert wide.dtype == torch.float32 and obj.dtype == dtype
    assert torch.equal(wide.parameters_vector(), obj.parameters_vector().float())
    assert torch.equal(wide.tensors()[0], obj.tensors()[0].float())
    assert torch.equal(wide.cast(dtype).gradient(), obj.gradient())


@both
def test_recalibration_keeps_the_dtype(dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    obj = Objective(model, "cross_entropy", data(10), batch_size=5)
    moved = obj.recalibrated()
    assert moved.buffers["1.running_mean"].dtype == dtype
    exact = obj.cast(torch.float64).recalibrated().buffers["1.running_var"]
    assert relative_error(moved.buffers["1.running_var"], exact) < 8 * torch.finfo(dtype).eps


class Centered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - 0.05 * x.mean(0))


@both
def test_examples_that_interact_a_little_are_found(dtype: torch.dtype):
    """The interaction is under the rounding of bfloat16 losses, not of float32 ones."""
    with pytest.raises(ValueError, match="for it alone"):
        gradient_norms(Objective(Centered().to(dtype), "cross_entropy", data()))


@both
def test_nan_names_the_example(dtype: torch.dtype):
    x, y = data()
    x[7, 1] = float("nan")
    obj = Objective(linear(dtype), "cross_entropy", (x, y), batch_size=4)
    for function in (obj.loss, obj.gradient, obj.evaluate):
        with pytest.raises(NonFiniteLossError, match="example 7 at a point of norm"):
            function()


def test_mixed_dtypes_are_refused():
    model = nn.Sequential(nn.Linear(4, 4).half(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"of one dtype.*got float16 \('0\.weight'\), float32"):
        Objective(model, "cross_entropy", data())


@both
def test_second_derivatives_and_paths_are_refused_at_once(dtype: torch.dtype):
    obj = Objective(linear(dtype), "cross_entropy", data())
    theta = obj.parameters_vector()
    line = linear_path(theta, theta + 1, 3)
    images, _ = load("digits", limit=20)
    model = build("digits-cnn").to(dtype)
    for refused in (
        lambda: HessianOperator(obj),
        lambda: GGNOperator(obj),
        lambda: hessian_trace(obj),
        lambda: curvature_profile(obj, line, 2, ("hessian_trace",)),
        lambda: curvature_profile(obj, line, 2, ("loss", "top_eigenvalue")),
        lambda: path_losses(obj, line),
        lambda: auto_neb(obj, theta, theta + 1),
        lambda: relax(obj, line, 0.5, ProjectedSGD(0.1, 2, steps=1)),
        lambda: train(model, images, TrainConfig(epochs=1), seed=0),
        lambda: measure_line(model, model, images),
    ):
        with pytest.raises(ValueError, match=r"expected float.* got b?float16; .*model\.float\(\)"):
            refused()


@both
def test_a_profile_without_second_derivatives_is_computed(dtype: torch.dtype):
    obj = Objective(linear(dtype), "cross_entropy", data())
    theta = obj.parameters_vector()
    line = Path(torch.stack((theta, theta + 1)))
    table = curvature_profile(obj, line, [0.0, 1.0], ("loss", "fisher_trace", "norm"))
    wide = curvature_profile(
        obj.cast(torch.float64),
        Path(line.pivots.double()),
        [0.0, 1.0],
        ("loss", "fisher_trace", "norm"),
    )
    for name in ("loss", "fisher_trace", "norm"):
        assert table[name].tolist() == pytest.approx(wide[name].tolist(), rel=0.1)
