"""What CUDA's graphs hold, seen without a GPU: forward passes traced with fake CUDA tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import traced_on_cuda

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA"
)
# They go by torch's forward mode, on a CPU too, or depend on no parameter.
BY_TORCH = {"<built-in function getitem>", "aten.zeros.default"}


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    """What each model's graph holds, by device."""
    program = [sys.executable, "-W", "ignore", traced_on_cuda.__file__]
    ended = subprocess.run(program, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("name", traced_on_cuda.MODELS)
def test_every_operation_on_cuda_has_a_rule(traces: dict[str, Any], name: str):
    assert set(traces[name]["cuda"]["without a rule"]) <= BY_TORCH


@pytest.mark.parametrize("name", [*traced_on_cuda.OF_IMAGES, "transformer"])
def test_graphs_on_cuda_are_those_on_a_cpu_and_normalization_is_fused(
    traces: dict[str, Any], name: str
):
    cuda, cpu = traces[name]["cuda"], traces[name]["cpu"]
    assert cuda["operations"] == cpu["operations"]
    assert cuda["fused"] == cuda["norms"]
