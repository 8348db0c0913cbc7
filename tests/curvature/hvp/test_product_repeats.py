"""Products again and again: the same memory, and the same bits."""

import gc
import hashlib

import pytest
import torch
from cases import by_name
from memory_of import script_output
from torch import Tensor

from entropic_fast import NotConvergedWarning
from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    hessian_trace,
    spectral_density,
    top_eigenvalues,
)


def test_new_operators_leave_nothing_behind():
    obj = by_name("attention").objective()
    v = torch.ones(obj.num_params, dtype=torch.float64)

    def tensors() -> int:
        gc.collect()
        return sum(type(o) is Tensor for o in gc.get_objects())

    def use() -> None:
        for kind in (HessianOperator, GGNOperator, JacobianOperator):
            kind(obj) @ v

    use()
    before = tensors()
    for _ in range(5):
        use()
    assert tensors() == before


def results(name: str) -> str:
    """A digest of all bits of what is computed with one seed."""
    obj = by_name(name).objective(33)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(obj.num_params, 9, dtype=torch.float64, generator=generator)
    hessian, ggn, jacobian = HessianOperator(obj), GGNOperator(obj), JacobianOperator(obj)
    found = [hessian @ vectors, hessian @ vectors[:, 0], hessian.quadratic_forms(vectors)]
    found += [ggn @ vectors, jacobian @ vectors, jacobian.T @ (jacobian @ vectors)]
    trace = hessian_trace(obj, probes=8, seed=3)
    pairs, density = top_eigenvalues(hessian, 2, seed=3), spectral_density(hessian, seed=3)
    found += [torch.tensor([trace.value, trace.std_error], dtype=torch.float64)]
    found += [pairs.values, pairs.vectors, pairs.residuals, density.nodes, density.weights]
    digest = hashlib.sha256()
    for tensor in found:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


REPEAT = """
sys.path[:0] = [sys.argv[1] + "/support", sys.argv[1] + "/curvature/hvp"]
from test_product_repeats import results
print(results(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["residual in place", "attention", "data-dependent branch"])
def test_results_are_the_same_bits_with_one_seed(request, name: str):
    first = results(name)
    assert results(name) == first
    tests = request.config.rootpath / "tests"
    assert script_output(REPEAT, tests, name).strip() == first


def test_a_search_keeps_values_from_its_first_product_on():
    """As it makes many at one point; a single product by itself keeps nothing."""
    obj = by_name("residual in place").objective(2)
    one, search = HessianOperator(obj), HessianOperator(obj)
    one @ torch.ones(obj.num_params, dtype=obj.dtype)
    with pytest.warns(NotConvergedWarning):
        top_eigenvalues(search, 1, max_matvecs=1)
    assert one._engine is not None and search._engine is not None
    assert not one._engine._kept and search._engine._kept
