"""Scores of random models against one ordinary backward pass an example.

The models mix layers, shapes, losses and ways of sharing parameters; the last tests state what
the seeds have covered.
"""

from collections import Counter

import pytest
import torch
from random_models import RandomCase, random_case

from entropic_fast.curvature import fisher_trace, gradient_norms, score_gram, score_matrix

SEEDS = range(700)
SOME = range(0, 700, 7)
# Padding of even kernels by "same" is announced as slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def assert_rows_match(case: RandomCase, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Each parameter's scores, to 1e-11 of their own norm.

    A score that is zero in exact arithmetic (a bias before a normalisation) is rounding, which
    has the size of what cancels times eps: hence the second term.
    """
    noise = 1e-12 * float(expected.norm())
    begin = 0
    for name, parameter in case.named_parameters().items():
        columns = slice(begin, begin + parameter.numel())
        begin += parameter.numel()
        error = float((got[:, columns] - expected[:, columns]).norm())
        scale = float(expected[:, columns].norm())
        assert error <= 1e-11 * scale + noise, (
            f"seed {case.seed}: {name}{list(parameter.shape)} is off by {error:.3g}, of "
            f"{scale:.3g}; kinds: {sorted(case.kinds)}\n{case.model}"
        )
    assert got.shape == expected.shape and begin == got.shape[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_in_float64_is_that_of_single_backward_passes(seed: int):
    case = random_case(seed)
    obj, expected = case.objective(), case.scores()
    assert_rows_match(case, score_matrix(obj), expected)
    gram = expected @ expected.T
    squares, scale = gram.diagonal(), float(gram.norm())
    assert float((score_gram(obj) - gram).norm()) <= 1e-11 * scale
    assert float((gradient_norms(obj) - squares).norm()) <= 1e-11 * scale
    assert fisher_trace(obj).value == pytest.approx(float(squares.mean()), rel=1e-11)


@pytest.mark.parametrize("seed", SOME)
def test_everything_in_float32_is_close_to_it(seed: int):
    case = random_case(seed)
    obj, expected = case.objective(torch.float32), case.scores()
    got = score_matrix(obj)
    assert got.dtype == torch.float32
    largest = float(expected.norm(dim=1).max())
    errors = (got.double() - expected).norm(dim=1)
    assert bool((errors <= 1e-4 * expected.norm(dim=1) + 1e-6 * largest).all())
    gram = expected @ expected.T
    scale = float(gram.norm())
    assert float((score_gram(obj) - gram).norm()) <= 2e-4 * scale
    assert float((gradient_norms(obj) - gram.diagonal()).norm()) <= 2e-4 * scale
    assert fisher_trace(obj).value == pytest.approx(float(gram.trace()) / len(gram), rel=2e-4)


def test_a_seed_makes_one_case():
    for seed in (3, 4):
        first, second = random_case(seed), random_case(seed)
        assert torch.equal(first.inputs, second.inputs) and first.kinds == second.kinds
        assert torch.equal(first.scores(), second.scores())
