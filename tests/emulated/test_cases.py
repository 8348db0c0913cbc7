"""Every model of tests/cases.py on the emulated GPU: what the CPU finds, in either precision."""

from __future__ import annotations

import device_checks
import pytest
import torch


@pytest.mark.parametrize("dtype", device_checks.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", device_checks.MODELS)
def test_a_model_on_a_gpu_is_the_model_on_the_cpu(name: str, dtype: torch.dtype, emulated):
    device_checks.check_model(name, dtype, "emulated")
    assert not emulated.reduced_precision
