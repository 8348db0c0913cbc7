"""Dynamics on a GPU are those on the CPU: same noise, same numbers to rounding."""

import pytest
import torch

from entropic_fast.dynamics import (
    Execution,
    LangevinIntegrator,
    ProjectedSGD,
    RingPotential,
    relax,
    simulate_langevin,
)
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.models import digits_cnn, initialize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_relax_on_a_gpu_is_relax_on_the_cpu(optimizer, backend):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 1, 8, 8, generator=g), torch.randint(10, (40,), generator=g)
    model = initialize(digits_cnn("batch", channels=(4, 4, 4)), 1).double()
    lr = 0.002 if optimizer == "adam" else 0.05
    runs = []
    for device in ("cpu", "cuda"):
        obj = Objective(model, "cross_entropy", data, device=device)
        a = obj.parameters_vector()
        b = a + torch.linspace(-0.1, 0.1, len(a), device=device, dtype=a.dtype)
        runs.append(
            relax(
                obj,
                linear_path(a, b, pivots=3),
                [0.2, 0.6, 0.6],
                ProjectedSGD(
                    [lr, lr, 1e200 if optimizer == "sgd" else lr],
                    8,
                    project_every=4,
                    steps=12,
                    optimizer=optimizer,
                ),
                execution=Execution(backend=backend),
            )
        )
    cpu, cuda = runs
    assert cuda.position.device.type == "cpu"
    assert cuda.diverged.tolist() == [False, False, optimizer == "sgd"] == cpu.diverged.tolist()
    for name in ("position", "distance", "loss"):
        torch.testing.assert_close(
            getattr(cuda, name), getattr(cpu, name), rtol=1e-6, atol=1e-9, equal_nan=True
        )


def test_langevin_on_a_gpu_has_the_noise_of_the_cpu():
    ring = RingPotential(modes=2)
    start = ring.on_ring(torch.linspace(0, 6, 1001, dtype=torch.float64))
    cpu, cuda = (
        simulate_langevin(ring, start.to(d), LangevinIntegrator(0.1, 0.01), 50)
        for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(cuda.final.cpu(), cpu.final, rtol=1e-9, atol=1e-9)
