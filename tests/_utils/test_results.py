"""Estimates against the formulas for the mean of a sample."""

import math

import pytest
import torch

from entropic_fast._utils.results import Estimate


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_standard_error_is_that_of_the_mean(n):
    samples = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    found = Estimate.from_samples(samples, exact=3.0)
    assert found.value == pytest.approx(3.0 + float(samples.mean()))
    assert found.std_error == pytest.approx(float(samples.std(unbiased=True)) / math.sqrt(n))
    assert found.samples == n


def test_errors_of_both_parts_add_in_squares():
    found = Estimate.from_samples(torch.tensor([1.0, 3.0]), exact=1.0, exact_std_error=2.0)
    assert found.std_error == pytest.approx(math.hypot(1.0, 2.0))


def test_one_sample_has_no_standard_error():
    assert math.isnan(Estimate.from_samples(torch.tensor([4.0])).std_error)
