"""The multi-output Jacobian's Gram matrix, against Jacobians by one backward pass an output."""

import pytest
import torch
from cases import CASES, Case, by_name, relative_error
from torch import Tensor, nn

from entropic_fast.curvature import GGNOperator
from entropic_fast.curvature.per_example._ntk import ntk_gram
from entropic_fast.objective import Objective
from entropic_fast.objective.data import RepeatedExamples

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """d output_k(x_e) / d parameters by ordinary backward passes.  # [E, K, P]"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(inputs)):
        for output in model(inputs[i : i + 1]).flatten():
            gradients = torch.autograd.grad(
                output, parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows).view(len(inputs), -1, rows[0].numel())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_that_of_explicit_jacobians(case: Case, dtype: torch.dtype):
    model, inputs, _ = case.build(5)
    rows = jacobian(model, inputs)
    got = ntk_gram(case.objective(5, dtype=dtype))
    assert got.dtype == torch.float64 and got.shape == (5, 3, 5, 3)
    expected = torch.einsum("ekp,flp->ekfl", rows, rows)
    assert relative_error(got, expected) < TOLERANCE[dtype]


def test_a_linear_model_has_its_closed_form():
    """K(x, x') = (x . x' + 1) times the identity, with the bias; the point does not matter."""
    x = randn(6, 4)
    obj = Objective(nn.Linear(4, 3).double(), "mse", (x, randn(6, 3)))
    expected = torch.einsum("ef,kl->ekfl", x @ x.T + 1, torch.eye(3).double())
    assert torch.allclose(ntk_gram(obj), expected, atol=1e-13)
    assert torch.allclose(ntk_gram(obj, obj.parameters_vector() * 7), expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_outputs_of_any_shape_are_flattened(shape: tuple[int, ...]):
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, max(1, torch.Size(shape).numel())).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)).reshape(len(x), *shape)

    model, x = Shaped(), randn(5, 4)
    obj = Objective(model, "mse", (x, randn(5, *shape)))
    rows = jacobian(model, x)
    expected = torch.einsum("ekp,flp->ekfl", rows, rows)
    assert torch.allclose(ntk_gram(obj), expected, atol=1e-13)


def test_eigenvalues_are_those_of_the_gauss_newton_matrix():
    """For mse that matrix is J^T J times 2 / (K N), and J J^T has the same eigenvalues."""
    model, x, _ = by_name("layer norm").build(6)
    obj = Objective(model, "mse", (x, randn(6, 3)))
    matrix = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    kernel = ntk_gram(obj).view(18, 18) * 2 / 18
    expected = torch.linalg.eigvalsh(matrix)[-18:]
    assert torch.allclose(torch.linalg.eigvalsh(kernel), expected, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_points_and_counts(size: int):
    case = by_name("tied weight")
    whole, obj = case.objective(7, batch_size=7), case.objective(7, batch_size=size)
    theta = obj.parameters_vector() * 1.3 - 0.1
    kernel = ntk_gram(whole, theta)
    assert torch.allclose(ntk_gram(obj, theta), kernel, atol=1e-13)
    for count in (1, 4):
        part = ntk_gram(obj, theta, max_examples=count)
        assert torch.allclose(part, kernel[:count, :, :count], atol=1e-13)
    obj.load_into(model := case.build(7)[0], theta)
    moved = Objective(model, "cross_entropy", case.build(7)[1:])
    assert torch.allclose(ntk_gram(moved), kernel, atol=1e-13)


def test_inputs_are_never_repeated_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    """No batch of the 1,200 pairs holds all of them."""
    seen = []
    original = RepeatedExamples.batches

    def batches(self, max_examples=None, batch_size=None):
        for batch in original(self, max_examples, batch_size):
            seen.append(batch.inputs.untyped_storage().nbytes() // (4 * 8))
            yield batch

    monkeypatch.setattr(RepeatedExamples, "batches", batches)
    obj = Objective(nn.Linear(4, 3).double(), "mse", (randn(400, 4), randn(400, 3)), batch_size=10)
    ntk_gram(obj)
    assert max(seen) <= 1024 and sum(seen) >= 1200


@pytest.mark.parametrize("group_by", ["parameter", "module"])
def test_shares_are_the_kernels_of_their_parameters(group_by: str):
    model, inputs, _ = by_name("layer norm").build(5)
    obj = by_name("layer norm").objective(5)
    rows = jacobian(model, inputs)
    parts = obj.split(obj.parameters_vector())
    slices = dict(zip(parts, rows.split([p.numel() for p in parts.values()], 2), strict=True))
    shares = ntk_gram(obj, group_by=group_by)
    for name, share in shares.items():
        own = [s for n, s in slices.items() if name in (n, n.rpartition(".")[0])]
        expected = sum(torch.einsum("ekp,flp->ekfl", s, s) for s in own)
        assert relative_error(share, expected) < 1e-12
    assert relative_error(sum(shares.values()), ntk_gram(obj)) < 1e-13


def test_the_loss_and_the_targets_play_no_part():
    x = randn(5, 4)
    model = by_name("raw parameter").build()[0]
    a = Objective(model, "mse", (x, randn(5, 3)))
    b = Objective(model, lambda out, y: out[:, 0] * y, (x, randn(5)))
    assert torch.equal(ntk_gram(a), ntk_gram(b))


def test_half_precision():
    x = randn(5, 4)
    model = nn.Linear(4, 3).bfloat16()
    obj = Objective(model, "mse", (x, randn(5, 3)))
    assert relative_error(ntk_gram(obj), ntk_gram(obj.cast(torch.float64))) < 0.02


def test_bad_input_is_refused():
    obj = by_name("raw parameter").objective(7)
    with pytest.raises(ValueError, match="max_examples: expected at most the 7 examples"):
        ntk_gram(obj, max_examples=8)
    with pytest.raises(ValueError, match="theta"):
        ntk_gram(obj, torch.ones(3))
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        ntk_gram(obj, memory_budget=1000)
    x = randn(7, 4)
    x[5, 1] = float("inf")
    with pytest.raises(ValueError, match=r"outputs: expected finite values, .* example 5"):
        ntk_gram(Objective(nn.Linear(4, 3).double(), "mse", (x, randn(7, 3)), batch_size=2))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="depend on that example alone"):
        ntk_gram(Objective(model, "mse", (randn(7, 4), randn(7, 3)), norm="batch"))


def test_outputs_of_another_number_are_refused():
    batches = [(randn(2, t, 4), randn(2, 3 * t)) for t in (4, 2)]
    obj = Objective(nn.Sequential(nn.Linear(4, 3), nn.Flatten()).double(), "mse", batches)
    with pytest.raises(ValueError, match=r"12 numbers for every example.* got 6 for example 2"):
        ntk_gram(obj)
