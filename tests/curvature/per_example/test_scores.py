"""Scores against one ordinary backward pass an example, and closed forms."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, by_name, plain_scores, relative_error
from torch import nn

from entropic_fast.curvature import (
    fisher_trace,
    gradient_norms,
    score_gram,
    score_matrix,
    score_spectrum,
    score_spectrum_floor,
)
from entropic_fast.curvature.per_example._chunks import ExampleGradients
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.objective import NonFiniteLossError, Objective

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def wide_and_tall() -> list[Objective]:
    """E < P and E > P."""
    return [by_name("layer norm").objective(9), by_name("raw parameter").objective(33)]


@both_dtypes
@all_cases
def test_scores_are_those_of_the_one_by_one_loop(case: Case, dtype: torch.dtype):
    got = score_matrix(case.objective(dtype=dtype))
    assert got.dtype == dtype
    assert relative_error(got, plain_scores(case)) < TOLERANCE[dtype]


@all_cases
def test_gram_spectrum_norms_and_trace_follow_from_the_scores(case: Case):
    obj, scores = case.objective(), plain_scores(case)
    gram = scores @ scores.T
    assert relative_error(score_gram(obj), gram) < 1e-13
    expected = torch.linalg.svdvals(scores).square() / len(scores)
    assert torch.allclose(score_spectrum(obj), expected, atol=float(expected[0]) * 1e-13)
    assert torch.allclose(gradient_norms(obj), gram.diagonal(), rtol=1e-12)
    assert fisher_trace(obj).value == pytest.approx(float(gram.trace()) / len(scores), rel=1e-12)


@pytest.mark.parametrize("name", ["data-dependent branch"])
def test_models_that_vmap_refuses_go_one_by_one(name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        score_matrix(by_name(name).objective())
    assert "one example at a time" in caplog.text


def test_a_point_other_than_the_models_own():
    case = by_name("tied weight")
    model, inputs, targets = case.build()
    obj = case.objective()
    theta = obj.parameters_vector() * 1.3 - 0.1
    obj.load_into(model, theta)
    moved = Objective(model, "cross_entropy", (inputs, targets))
    assert torch.equal(score_matrix(obj, theta), score_matrix(moved))
    assert not torch.allclose(score_matrix(obj, theta), score_matrix(obj))


def test_the_mean_score_is_the_gradient():
    for obj in wide_and_tall():
        assert torch.allclose(score_matrix(obj).mean(0), obj.gradient(), atol=1e-14)


def test_a_short_last_batch_changes_nothing():
    case = by_name("group norm")
    ragged, whole = case.objective(33, batch_size=32), case.objective(33, batch_size=33)
    assert torch.allclose(score_matrix(ragged), score_matrix(whole), atol=1e-14)
    assert fisher_trace(ragged).value == pytest.approx(fisher_trace(whole).value, rel=1e-12)
    assert torch.allclose(score_gram(ragged), score_gram(whole), atol=1e-13)


def test_batches_from_a_loader_match_tensors():
    model, inputs, targets = by_name("layer norm").build(11)
    batches = [(inputs[:5], targets[:5]), (inputs[5:6], targets[5:6]), (inputs[6:], targets[6:])]
    loader, tensors = (Objective(model, "cross_entropy", d) for d in (batches, (inputs, targets)))
    assert torch.allclose(score_gram(loader), score_gram(tensors), atol=1e-13)
    assert torch.allclose(
        score_matrix(loader, max_examples=7), score_matrix(tensors)[:7], atol=1e-14
    )


def test_max_examples_takes_the_first():
    for obj in wide_and_tall():
        scores = score_matrix(obj)[:5]
        assert torch.allclose(score_matrix(obj, max_examples=5), scores, atol=1e-14)
        assert torch.allclose(score_gram(obj, max_examples=5), scores @ scores.T, atol=1e-13)
        assert len(score_spectrum(obj, max_examples=5)) == 5


def test_one_example_and_one_parameter():
    x = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    theta = torch.tensor([0.5], dtype=torch.float64)
    obj = Objective(model, "mse", (x, torch.ones_like(x)))
    expected = 2 * (0.5 * x - 1) * x  # d (theta x - 1)^2 / d theta
    assert torch.allclose(score_matrix(obj, theta), expected)
    assert torch.allclose(score_spectrum(obj, theta), expected.square().mean().view(1))
    single = Objective(model, "mse", (x[1:], torch.ones_like(x[1:])))
    assert score_gram(single, theta).item() == pytest.approx(9.0)
    estimate = fisher_trace(single, theta)
    assert estimate.value == pytest.approx(9.0)
    assert math.isnan(estimate.std_error) and estimate.samples == 1


def test_linear_softmax_has_its_closed_form():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    obj = Objective(nn.Linear(4, 3, bias=False).double(), "cross_entropy", (x, y))
    weight = obj.parameters_vector().view(3, 4)
    error = (x @ weight.T).softmax(1) - nn.functional.one_hot(y, 3)
    expected = torch.einsum("nc,ni->nci", error, x).flatten(1)
    assert torch.allclose(score_matrix(obj), expected, atol=1e-14)


def test_standard_error_is_that_of_a_mean_over_examples():
    obj = by_name("attention").objective(33)
    norms = gradient_norms(obj)
    estimate = fisher_trace(obj)
    assert estimate.std_error == pytest.approx(float(norms.std() / 33**0.5), rel=1e-12)
    assert estimate.samples == 33


def test_padding_row_of_an_embedding_has_no_score():
    table = nn.Embedding(5, 2, padding_idx=0).double()
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(6, 3).double())
    inputs = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 1]])
    obj = Objective(model, "cross_entropy", (inputs, torch.tensor([0, 1, 2])))
    scores = score_matrix(obj)
    assert not scores[:, :2].any() and scores[:, 2:].any()


class Words(nn.Module):
    """Embedded words; tied, the table is used twice and goes as a copy an example."""

    def __init__(self, tied: bool, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(6, 4, padding_idx=0, **options), nn.Linear(4, 3)
        self.tied = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x).mean(1)
        if self.tied:
            h = torch.tanh(h @ self.table.weight.t()) @ self.table.weight
        return self.out(torch.tanh(h))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", ["none", "scale_grad_by_freq", "sparse"])
def test_options_of_an_embedding(tied: bool, option: str):
    model = Words(tied, **({} if option == "none" else {option: True})).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 6, (9, 7), generator=generator)
    x[0] = torch.arange(7) % 6  # no word twice, but the padding
    y = torch.randint(0, 3, (9,), generator=generator)
    rows = []
    for i in range(9):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    scores = score_matrix(Objective(model, "cross_entropy", (x, y)))
    assert relative_error(scores, torch.stack(rows)) < 1e-14


# -- rounding ------------------------------------------------------------------------------


def test_repeated_examples_give_eigenvalues_under_the_floor():
    model, inputs, targets = by_name("group norm").build(6)
    for dtype in TOLERANCE:
        obj = Objective(
            model.to(dtype), "cross_entropy", (inputs.repeat(4, 1, 1, 1), targets.repeat(4))
        )
        values = score_spectrum(obj)
        floor = score_spectrum_floor(values, dtype)
        assert values.dtype == torch.float64 and bool((values >= 0).all())
        assert bool((values[6:] < floor).all()) and bool((values[:6] > floor).all())


def test_float32_scores_keep_eigenvalues_far_under_their_own_rounding():
    """Products in float64: a spectrum over 12 decades comes out of float32 scores."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -6, 7)
    x = torch.linalg.qr(torch.randn(7, 7, generator=generator))[0] * scales[:, None]
    obj = Objective(nn.Linear(7, 1, bias=False), lambda out, y: out[:, 0] * y, (x, torch.ones(7)))
    values = score_spectrum(obj)
    assert torch.allclose(values, scales.double().square() / 7, rtol=1e-2)


def test_floor_bounds_the_rounding_of_singular_values():
    for name in ("transformer layer", "residual in place", "padding same"):
        exact = score_spectrum(by_name(name).objective(20))
        rounded = score_spectrum(by_name(name).objective(20, dtype=torch.float32))
        gap = (exact.sqrt() - rounded.sqrt()).abs().max()
        assert float(gap) <= score_spectrum_floor(rounded, torch.float32) ** 0.5


def test_the_floor_is_of_one_matrix():
    spectra = score_spectrum(by_name("layer norm").objective(6), group_by="parameter")
    with pytest.raises(ValueError, match=r"spectrum: .* pass one value at a time"):
        score_spectrum_floor(spectra, torch.float64)
    assert all(score_spectrum_floor(values, torch.float64) > 0 for values in spectra.values())
    assert score_spectrum_floor(torch.zeros(0), torch.float64) == 0
    with pytest.raises(ValueError, match="spectrum: expected finite"):
        score_spectrum_floor(torch.tensor([1.0, float("nan")]), torch.float64)


# -- memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer norm", "data-dependent branch", "conv 1d strided"])
def test_any_budget_gives_the_same_gram(name: str):
    obj = by_name(name).objective(23, batch_size=7)
    one = ExampleGradients(obj).example_bytes
    result = 8 * 23 * 23
    whole = score_gram(obj)
    for examples in (2, 3, 5, 9, 30):
        budget = result + examples * one + 2000
        assert torch.allclose(score_gram(obj, memory_budget=budget), whole, atol=1e-13)


def test_a_small_budget_means_small_chunks(monkeypatch: pytest.MonkeyPatch):
    obj = by_name("layer norm").objective(30, batch_size=30)
    seen = []
    original = PerExampleGradEngine.run

    def record(self, batch, sink):
        seen.append(len(batch.inputs))
        return original(self, batch, sink)

    monkeypatch.setattr(PerExampleGradEngine, "run", record)
    score_gram(obj, strategy="recompute")
    assert seen[-1] == 30
    seen.clear()
    one = ExampleGradients(obj).example_bytes
    score_gram(obj, memory_budget=8 * 900 + 4 * one, strategy="recompute")
    assert max(seen) < 10 and 30 < sum(seen) <= 30 * 30


def test_second_moment_is_chunked_too():
    obj = by_name("raw parameter").objective(40, batch_size=40)
    scores = score_matrix(obj)
    expected = torch.linalg.eigvalsh(scores.T @ scores / 40).flip(0)
    size = 8 * obj.num_params**2
    budget = 4 * size + 2 * ExampleGradients(obj).example_bytes + 8 * obj.num_params * 32
    got = score_spectrum(obj, memory_budget=budget)
    assert torch.allclose(got, expected, atol=1e-13)


@pytest.mark.parametrize("function", [score_gram, score_spectrum])
def test_a_budget_too_small_is_refused_with_what_is_needed(function):
    for obj in wide_and_tall():
        with pytest.raises(ValueError, match=r"memory_budget: expected at least .* got 100 bytes"):
            function(obj, memory_budget=100)


PEAK = """
import gc, sys, torch
from torch import nn
from entropic_fast.objective import Objective
from entropic_fast.curvature import score_gram

def status(key):
    line = [l for l in open("/proc/self/status") if l.startswith(key)][0]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 10))
obj = Objective(model, "cross_entropy", (torch.randn(256, 64), torch.randint(0, 10, (256,))))
score_gram(obj, max_examples=1)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
score_gram(obj, memory_budget=int(sys.argv[1]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_near_the_budget():
    """The score matrix is 73 MiB; the process grows by no more than 1.25 x 30 MiB."""
    budget = 30 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(budget)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 1.25 * budget


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [score_matrix, score_gram, score_spectrum, gradient_norms, fisher_trace]
)
def test_examples_that_influence_one_another_are_refused(function):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="depend on that example alone"):
        function(Objective(model, "cross_entropy", data, norm="batch"))


@pytest.mark.parametrize(
    "function", [score_matrix, score_gram, score_spectrum, gradient_norms, fisher_trace]
)
def test_nan_names_the_example(function):
    x = torch.ones(6, 4)
    x[4, 2] = float("nan")
    obj = Objective(nn.Linear(4, 3), "cross_entropy", (x, torch.zeros(6, dtype=torch.int64)))
    with pytest.raises(NonFiniteLossError, match="example 4"):
        function(obj)


def test_an_infinite_gradient_of_a_finite_loss_names_the_example():
    x = torch.tensor([[1.0], [0.0], [2.0]])
    obj = Objective(nn.Linear(1, 1, bias=False), lambda out, y: out[:, 0].abs().sqrt(), (x, x))
    with pytest.raises(ValueError, match=r"gradient: .* example 1 at a point of norm"):
        score_matrix(obj)


@pytest.mark.parametrize("bad", [0, -1, 8, 2.5, True])
@pytest.mark.parametrize("function", [score_matrix, score_gram, score_spectrum])
def test_max_examples_out_of_range_is_refused(function, bad):
    with pytest.raises(ValueError, match="max_examples"):
        function(by_name("raw parameter").objective(7), max_examples=bad)


def test_points_that_do_not_fit_are_refused():
    obj = by_name("raw parameter").objective()
    theta = obj.parameters_vector()
    with pytest.raises(ValueError, match=r"theta: expected a tensor of shape \[17\]"):
        score_matrix(obj, theta[:-1])
    with pytest.raises(ValueError, match=r"theta: expected torch\.float64"):
        score_gram(obj, theta.float())
    with pytest.raises(ValueError, match="theta: expected finite"):
        fisher_trace(obj, theta * float("inf"))


def test_a_matrix_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    from entropic_fast.curvature.per_example import _scores as score

    monkeypatch.setattr(score, "available_bytes", lambda device: 500)
    with pytest.raises(ValueError, match="score_gram, which needs no whole score matrix"):
        score_matrix(by_name("raw parameter").objective())
