"""Curvature beside the plain torch.func ways, on the digits CNN; small, for orientation.

Baselines are what one would write without this package: `vmap(grad)` and singular values for
the spectrum, `jvp(grad)` for a product, one product a probe for the trace.
"""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from entropic_fast.curvature import (
    HessianOperator,
    fisher_trace,
    hessian_trace,
    score_spectrum,
    top_eigenvalues,
)
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits.streams import rademacher
from entropic_fast.training.models import build, initialize

EXAMPLES, PROBES = 64, 4
# Forward-mode differentiation compiles its decompositions with the deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Plain:
    """The digits CNN on random images, as dictionaries of parameters."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = initialize(build("digits-cnn"), seed=0).eval()
        self.x, self.y = torch.randn(EXAMPLES, 1, 8, 8), torch.randint(0, 10, (EXAMPLES,))
        self.values = {name: p.detach() for name, p in self.model.named_parameters()}
        self.count = sum(p.numel() for p in self.values.values())

    def loss(self, values, x, y):
        outputs = functional_call(self.model, values, (x,))
        return torch.nn.functional.cross_entropy(outputs, y)

    def one(self, values, x, y):
        return self.loss(values, x[None], y[None])

    def scores(self):
        rows = vmap(grad(self.one), in_dims=(None, 0, 0))(self.values, self.x, self.y)
        return torch.cat([g.flatten(1) for g in rows.values()], 1)

    def split(self, flat):
        parts = flat.split([p.numel() for p in self.values.values()])
        return {
            name: part.view_as(p)
            for (name, p), part in zip(self.values.items(), parts, strict=True)
        }

    def product(self, flat):
        tangents = (self.split(flat),)
        out = jvp(lambda v: grad(self.loss)(v, self.x, self.y), (self.values,), tangents)[1]
        return torch.cat([part.flatten() for part in out.values()])


@pytest.fixture(scope="module")
def plain():
    return Plain()


@pytest.fixture(scope="module")
def objective(plain):
    return Objective(plain.model, "cross_entropy", (plain.x, plain.y))


@pytest.fixture(autouse=True)
def _record(benchmark, provenance):
    benchmark.extra_info.update(provenance, examples=EXAMPLES, model="digits-cnn")


@pytest.mark.benchmark(group="gradient")
def test_plain_gradient(benchmark, objective):
    benchmark(objective.gradient)


@pytest.mark.benchmark(group="score spectrum")
def test_score_spectrum(benchmark, objective, plain):
    got = benchmark(score_spectrum, objective)
    expected = torch.linalg.svdvals(plain.scores().double()).square() / EXAMPLES
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected[0]))


@pytest.mark.benchmark(group="score spectrum")
def test_score_spectrum_by_torch_func_and_svd(benchmark, plain):
    benchmark(lambda: torch.linalg.svdvals(plain.scores()).square() / EXAMPLES)


@pytest.mark.benchmark(group="fisher trace")
def test_fisher_trace(benchmark, objective):
    benchmark(fisher_trace, objective)


@pytest.mark.benchmark(group="fisher trace")
def test_fisher_trace_by_torch_func(benchmark, plain):
    benchmark(lambda: plain.scores().square().sum(1).mean())


@pytest.mark.benchmark(group="hessian-vector product")
@pytest.mark.parametrize("columns", [1, PROBES])
def test_hessian_product(benchmark, objective, plain, columns):
    vectors = torch.randn(plain.count, columns)
    got = benchmark(lambda: HessianOperator(objective) @ vectors)
    expected = plain.product(vectors[:, 0])
    assert float((got[:, 0] - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.benchmark(group="hessian-vector product")
def test_hessian_product_by_torch_func(benchmark, plain):
    benchmark(plain.product, torch.randn(plain.count))


@pytest.mark.benchmark(group="hessian trace")
def test_hessian_trace(benchmark, objective):
    benchmark(lambda: hessian_trace(objective, probes=PROBES))


@pytest.mark.benchmark(group="hessian trace")
def test_hessian_trace_by_torch_func(benchmark, plain):
    def trace():
        probes = (rademacher((plain.count,), 0, i, dtype=torch.float32) for i in range(PROBES))
        return sum(float(v @ plain.product(v)) for v in probes) / PROBES

    benchmark(trace)


@pytest.mark.benchmark(group="largest eigenvalue")
def test_top_eigenvalue(benchmark, objective):
    pairs = benchmark(lambda: top_eigenvalues(HessianOperator(objective)))
    assert pairs.converged
