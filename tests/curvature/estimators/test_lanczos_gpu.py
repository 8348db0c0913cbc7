"""Krylov methods on a GPU agree with the CPU, and their steps do not wait for it."""

import pytest
import torch
from torch import Tensor

from entropic_fast.curvature import (
    DensitySettings,
    log_determinant,
    spectral_density,
    top_eigenvalues,
)
from entropic_fast.ops.random_bits import streams as random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def matrix() -> Tensor:
    q = torch.linalg.qr(random.normal((300, 300), 0))[0]
    return q * torch.linspace(-1, 2, 300).double() ** 3 @ q.T


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(("k", "block"), [(1, 1), (4, None), (4, 1)])
def test_eigenvalues_agree(which: str, k: int, block: int | None):
    a = matrix()
    here = top_eigenvalues(a, k, tol=1e-8, which=which, block=block)
    there = top_eigenvalues(a.cuda(), k, tol=1e-8, which=which, block=block)
    assert there.converged and there.vectors.is_cuda
    assert torch.allclose(there.values.cpu(), here.values, atol=1e-10)


def test_densities_and_log_determinants_agree():
    a, along = matrix(), random.normal((300,), 1)
    here, there = (spectral_density(m, DensitySettings(probes=3, steps=20)) for m in (a, a.cuda()))
    assert torch.allclose(here.nodes, there.nodes, atol=1e-10)
    for arguments in ({"k": 3}, {"delta": 0.1}, {"k": 3, "delta": 0.1}):
        first = log_determinant(a, orthogonal_to=along, **arguments)
        second = log_determinant(a.cuda(), orthogonal_to=along.cuda(), **arguments)
        assert second.value == pytest.approx(first.value, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_between_looks_do_not_wait():
    class Watched:
        """From the third product on, two of three steps are under torch's own watch."""

        def __init__(self) -> None:
            self.matrix, self.products = matrix().cuda(), 0
            self.shape, self.dtype, self.device = self.matrix.shape, torch.float64, "cuda"

        def __matmul__(self, vectors: Tensor) -> Tensor:
            self.products += 1
            last = self.products >= 3 and self.products % 3 == 2
            watched = self.products >= 3 and not last
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            return self.matrix @ vectors

    operator = Watched()
    try:
        top_eigenvalues(operator, tol=1e-12, max_matvecs=11)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert operator.products >= 11
