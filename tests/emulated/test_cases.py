"""Every model of `cases` on the emulated GPU: what the CPU finds, in either precision."""

from __future__ import annotations

import device_checks
import pytest
import torch

import entropic_fast as ef
from entropic_fast.curvature.hvp._capture import capture
from entropic_fast.curvature.hvp._fusion import NormActBackward, NormActForward
from entropic_fast.curvature.hvp._interpreter import GraphInterpreter
from entropic_fast.training import models


@pytest.mark.parametrize("dtype", device_checks.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", device_checks.MODELS)
def test_a_model_on_a_gpu_is_the_model_on_the_cpu(name: str, dtype: torch.dtype, emulated):
    device_checks.check_model(name, dtype, "emulated")
    assert not emulated.reduced_precision


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_normalization_is_fused_as_on_the_cpu(norm: str):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def units(device: str) -> list[int]:
        model = models.initialize(models.build("resnet8", in_channels=3), 0)
        data = (images, torch.arange(4))
        obj = ef.Objective(model, "cross_entropy", data, norm=norm, device=device)
        interpreter = GraphInterpreter(capture(obj, obj.parameters_vector(), images.to(device)))
        ahead, behind = interpreter._forward_regions, interpreter._backward_regions
        return [
            sum(isinstance(unit, NormActForward) for unit in ahead),
            sum(isinstance(unit, NormActBackward) for unit in behind),
        ]

    expected = units("cpu")
    assert units("emulated") == expected
    assert expected == ([9, 9] if norm == "running" else [0, 0])
