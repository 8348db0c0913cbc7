"""Labels drawn from the model: their distribution, and the Fisher matrix of their scores."""

import pytest
import torch
from cases import by_name
from scipy import stats
from torch import Tensor, nn

from entropic_fast.curvature import GGNOperator, fisher_trace, score_matrix
from entropic_fast.curvature.per_example._sampled_labels import with_sampled_labels
from entropic_fast.objective import Objective


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Module:
    model = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        model.weight.copy_(scale * randn(outputs, inputs, seed=5))
        model.bias.copy_(randn(outputs, seed=6))
    return model


def second_moment(obj: Objective, draws: int) -> tuple[Tensor, Tensor]:
    """Mean of s s^T over the examples, and its standard error over the draws.  # [P, P] each"""
    scores = score_matrix(obj)
    count = len(scores) // draws
    outer = (scores[:, :, None] * scores[:, None]).reshape(count, draws, *2 * scores.shape[1:])
    error = (outer.var(1).sum(0) / draws).sqrt() / count
    return outer.mean((0, 1)), error


def fisher_cases() -> dict[str, tuple[Objective, float]]:
    """Objectives, and the factor of their Gauss-Newton matrix that the scores' moment is."""
    classes = torch.arange(6) % 3
    dense = nn.Conv1d(2, 3, 1).double()
    return {
        "softmax": (by_name("raw parameter").objective(6), 1.0),
        "soft labels": (
            Objective(linear(2, 3), "cross_entropy", (randn(6, 2), randn(6, 3, seed=1).softmax(1))),
            1.0,
        ),
        "softmax at 4 positions": (
            Objective(dense, "cross_entropy", (randn(6, 2, 4), classes[:, None].repeat(1, 4))),
            1 / 4,
        ),
        "mse": (Objective(linear(2, 3), "mse", (randn(6, 2), randn(6, 3, seed=1))), 1.0),
        "bce of 3 labels": (
            Objective(linear(2, 3), "bce", (randn(6, 2), (randn(6, 3, seed=1) > 0).double())),
            1 / 3,
        ),
        "4 of 6 labels count": (
            Objective(
                linear(2, 3),
                nn.CrossEntropyLoss(),
                (randn(6, 2), torch.where(torch.arange(6) % 3 == 2, -100, classes)),
            ),
            6 / 4,
        ),
        "next token": (
            Objective(
                nn.Embedding(3, 3).double(),
                "next_token",
                (classes[:, None].repeat(1, 4), torch.tensor([[0, 1, 2, -100]] * 6)),
            ),
            1 / 2,
        ),
        "mse of one output": (Objective(linear(3, 1), "mse", (randn(6, 3), randn(6, 1))), 1.0),
    }


@pytest.mark.parametrize("name", fisher_cases())
def test_scores_of_sampled_labels_have_the_fisher_matrix_as_second_moment(name: str):
    obj, factor = fisher_cases()[name]
    draws = 800
    eye = torch.eye(obj.num_params, dtype=torch.float64)
    expected = factor * (GGNOperator(obj) @ eye)
    moment, error = second_moment(with_sampled_labels(obj, draws=draws, seed=3), draws)
    known = error > 1e-9 * float(error.max())
    deviation = (moment - expected)[known] / error[known]
    assert float(deviation.abs().max()) < 5
    assert float(deviation.square().mean()) < 3
    assert torch.allclose(moment[~known], expected[~known], atol=1e-9)


def test_labels_of_a_summed_squared_error_have_its_gauss_newton_matrix():
    data = randn(6, 2), randn(6, 3, seed=1)
    obj = Objective(linear(2, 3), nn.MSELoss(reduction="sum"), data)
    moment, error = second_moment(with_sampled_labels(obj, draws=400), 400)
    expected = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    assert float(((moment - expected) / error.clamp(min=1e-9)).abs().max()) < 5


def test_weighted_likelihoods_are_refused():
    x, y = randn(6, 2), torch.arange(6) % 3
    for loss in (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(label_smoothing=0.1)):
        with pytest.raises(ValueError, match="with which it is no likelihood; draw the labels"):
            with_sampled_labels(Objective(linear(2, 3), loss, (x, y)))


def test_scores_of_given_labels_have_another_second_moment():
    obj, _ = fisher_cases()["softmax"]
    scores = score_matrix(obj)
    expected = GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)
    assert float((scores.T @ scores / 6 - expected).norm()) > 0.2 * float(expected.norm())


def test_the_trace_is_that_of_the_gauss_newton_matrix_within_its_error():
    obj = by_name("transformer layer").objective(12)
    exact = float((GGNOperator(obj) @ torch.eye(obj.num_params, dtype=torch.float64)).trace())
    draws = 200
    sampled = with_sampled_labels(obj, draws=draws)
    norms = score_matrix(sampled).square().sum(1).reshape(12, draws)
    error = float((norms.var(1).sum() / draws).sqrt()) / 12
    assert abs(fisher_trace(sampled).value - exact) < 4 * error


def test_classes_come_as_often_as_they_are_likely():
    obj = Objective(linear(2, 4), "cross_entropy", (randn(1, 2), torch.tensor([0])))
    labels = with_sampled_labels(obj, draws=3000).tensors()[1]
    p = obj.outputs(obj.parameters_vector(), obj.tensors()[0])[0].softmax(0)
    expected = (3000 * p).numpy()
    assert stats.chisquare(labels.bincount(minlength=4).numpy(), expected).pvalue > 1e-3


def test_noise_of_a_regression_has_variance_half_the_outputs():
    obj = Objective(linear(2, 3), "mse", (randn(4, 2), randn(4, 3)))
    inputs, targets = with_sampled_labels(obj, draws=3000).tensors()
    noise = (targets - obj.outputs(obj.parameters_vector(), inputs)).flatten() / 1.5**0.5
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_impossible_classes_are_never_drawn():
    model = nn.Linear(1, 5).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4]))
    obj = Objective(model, "cross_entropy", (torch.ones(2000, 1), torch.zeros(2000).long()))
    assert set(with_sampled_labels(obj).tensors()[1].tolist()) == {1, 3}


@pytest.mark.parametrize("name", fisher_cases())
def test_labels_do_not_depend_on_batches(name: str):
    obj, _ = fisher_cases()[name]
    inputs, targets = obj.tensors()
    whole = with_sampled_labels(obj, draws=3, seed=1).tensors()
    for size in (1, 4, 5):
        cut = with_sampled_labels(
            obj.with_data((inputs, targets), batch_size=size), draws=3, seed=1
        )
        assert torch.allclose(cut.tensors()[1], whole[1], atol=1e-12)
    few = with_sampled_labels(obj.with_data((inputs[:2], targets[:2])), draws=3, seed=1)
    assert torch.allclose(few.tensors()[1], whole[1][:6], atol=1e-12)


def test_more_draws_keep_the_first():
    obj, _ = fisher_cases()["softmax at 4 positions"]
    one, three = (with_sampled_labels(obj, draws=d).tensors() for d in (1, 3))
    assert one[1].shape == (6, 4) and three[1].shape == (18, 4)
    assert torch.equal(three[1][::3], one[1])
    assert torch.equal(three[0], one[0].repeat_interleave(3, 0))
    other = with_sampled_labels(obj, draws=3, seed=1).tensors()[1]
    assert not torch.equal(other, three[1])


def test_labels_are_those_of_the_point_and_the_result_is_at_it():
    obj, _ = fisher_cases()["mse"]
    theta = obj.parameters_vector() + 3
    there, here = with_sampled_labels(obj, theta), with_sampled_labels(obj)
    assert torch.equal(there.parameters_vector(), theta)
    shift = obj.outputs(theta, obj.tensors()[0]) - obj.outputs(
        obj.parameters_vector(), obj.tensors()[0]
    )
    assert torch.allclose(there.tensors()[1] - here.tensors()[1], shift, atol=1e-12)
    assert torch.allclose(score_matrix(there), score_matrix(there, theta))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype: torch.dtype):
    for loss, targets in (("cross_entropy", torch.arange(6) % 3), ("mse", randn(6, 3))):
        obj = Objective(linear(2, 3).to(dtype), loss, (randn(6, 2), targets))
        labels = with_sampled_labels(obj, draws=2)
        assert labels.dtype == dtype and labels.num_examples == 12
        assert fisher_trace(labels).value > 0


def test_what_has_no_likelihood_is_refused():
    x = randn(6, 2)
    custom = Objective(linear(2, 3), lambda out, y: out.square().sum(1), (x, x))
    with pytest.raises(
        ValueError, match=r"obj: expected a negative log-likelihood.*, got a loss the"
    ):
        with_sampled_labels(custom)
    obj, _ = fisher_cases()["mse"]
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="draws"):
            with_sampled_labels(obj, draws=bad)
    with pytest.raises(ValueError, match="theta"):
        with_sampled_labels(obj, x)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    batch = Objective(model, "cross_entropy", (x, torch.arange(6) % 3), norm="batch")
    with pytest.raises(ValueError, match="depend on that example alone"):
        with_sampled_labels(batch)


def test_nan_outputs_name_the_example():
    x = randn(6, 2)
    x[4, 1] = float("nan")
    obj = Objective(linear(2, 3), "cross_entropy", (x, torch.arange(6) % 3), batch_size=4)
    with pytest.raises(ValueError, match=r"outputs: expected finite .* example 4"):
        with_sampled_labels(obj)
