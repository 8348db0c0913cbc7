"""The first calls of a user with a GPU, on the emulated one: right, and on its device."""

from __future__ import annotations

import pytest
import torch

import entropic_fast as ef
from entropic_fast.training import models


@pytest.fixture(params=["emulated", "emulated:0"])
def pair(request):
    """An objective on the CPU and the same on the emulated GPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    data = (images, torch.randint(10, (24,), generator=generator))

    def build(device: str) -> ef.Objective:
        model = models.initialize(models.digits_cnn("batch", channels=(4, 4, 4)), 1)
        return ef.Objective(model, "cross_entropy", data, device=device)

    return build("cpu"), build(request.param)


def test_an_objective_takes_its_own_points(pair):
    cpu, gpu = pair
    assert gpu.device == torch.device("emulated", 0)
    theta = gpu.parameters_vector()
    assert gpu.loss(theta) == cpu.loss(cpu.parameters_vector())
    assert torch.equal(gpu.gradient(theta).cpu(), cpu.gradient())


def test_products_at_a_point(pair):
    cpu, gpu = pair
    v = torch.randn(cpu.num_params, 2, generator=torch.Generator().manual_seed(1))
    found = ef.HessianOperator(gpu, gpu.parameters_vector()) @ v.to("emulated")
    assert found.device == gpu.device
    expected = ef.HessianOperator(cpu) @ v
    assert float((found.cpu() - expected).norm() / expected.norm()) < 1e-6


def test_operands_on_two_devices_are_rejected(pair):
    _, gpu = pair
    with pytest.raises(RuntimeError, match="found at least two devices"):
        gpu.parameters_vector() + torch.zeros(gpu.num_params)
