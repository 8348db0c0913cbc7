"""Tests that did not ask for a GPU see none."""

import os

import pytest
import torch
from hidden_gpus import asks_for_gpus


@pytest.mark.parametrize(
    ("expression", "asks"),
    [("", False), ("gpu", True), ("not gpu", False), ("slow and not gpu", False), ("slow", False),
     ("gpu and slow", True), ("not slow and gpu", True)],
)  # fmt: skip
def test_gpus_are_asked_for_by_the_marker(expression, asks):
    assert asks_for_gpus(expression) == asks


def test_no_gpu_is_seen_unless_asked_for(request):
    if asks_for_gpus(request.config.getoption("markexpr")):
        pytest.skip("GPUs are asked for")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
