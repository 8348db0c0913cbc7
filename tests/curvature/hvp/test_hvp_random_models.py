"""Products, quadratic forms and Gauss-Newton products of random models, against autograd alone.

Autograd here is two ordinary backward passes of the whole loss (for the Gauss-Newton matrix, of
the outputs), which share no rule with the code under test.
"""

from collections import Counter

import pytest
import torch
from random_models import EPS, random_case

from entropic_fast.curvature import GGNOperator, HessianOperator, JacobianOperator, autograd_only

# Of seed 457 (replicated padding, channels last) torch 2.13 crashes in its own double backward.
SEEDS = [seed for seed in range(1, 600, 3) if seed != 457]
# torch has no second derivative of these, whichever way is taken.
NO_SECOND_DERIVATIVE = {"EmbeddingBag"}
# What a graph of operations does not show goes to autograd.
HIDDEN = {
    "autograd function", "branch on data", "hook", "output also detached", "size from data",
    "used under no_grad too", "weight also detached", "conv under no_grad too",
    "F.linear of a rounded weight",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("seed", SEEDS)
def test_products_and_forms_are_those_of_two_backward_passes(seed: int):
    case = random_case(seed)
    if NO_SECOND_DERIVATIVE & case.kinds:
        with pytest.raises(RuntimeError, match=r"nn\.EmbeddingBag: torch has no second"):
            HessianOperator(case.objective()) @ torch.ones(case.objective().num_params).double()
        return
    obj = case.objective()
    vectors = torch.randn(
        obj.num_params, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    for kind in (HessianOperator, GGNOperator):
        operator = kind(obj)
        with autograd_only():
            expected = kind(obj) @ vectors
        scale = float(expected.norm()) + 1e-9
        limit = 1e-9 * scale
        got = operator @ vectors
        if not float((got - expected).norm()) <= limit:
            # What cancels to almost nothing: as autograd's with a unit of the last place.
            with autograd_only():
                moved = kind(obj, obj.parameters_vector() * (1 + EPS)) @ vectors
            limit = 20 * float((moved - expected).norm())
        assert float((got - expected).norm()) <= limit, (seed, sorted(case.kinds))
        forms = operator.quadratic_forms(vectors)
        gap = float((forms - (vectors * expected).sum(0)).norm())
        assert gap <= limit * float(vectors.norm()), (seed, sorted(case.kinds))


@pytest.mark.parametrize("seed", SEEDS[::7])
def test_jacobian_products_are_those_of_autograd(seed: int):
    case = random_case(seed)
    obj = case.objective()
    jacobian = JacobianOperator(obj)
    with autograd_only():
        expected = JacobianOperator(obj)
    generator = torch.Generator().manual_seed(seed)
    pairs = [(jacobian.T, expected.T)]
    if not NO_SECOND_DERIVATIVE & case.kinds:  # autograd's J v is a second derivative too
        pairs.append((jacobian, expected))
    for mine, other in pairs:
        vectors = torch.randn(mine.shape[1], 2, dtype=torch.float64, generator=generator)
        reference = other @ vectors
        gap = float((mine @ vectors - reference).norm())
        assert gap <= 1e-10 * float(reference.norm()) + 1e-14, (seed, sorted(case.kinds))


def test_most_models_go_by_rules():
    """Those with something that a graph does not show go to autograd, and hardly any other."""
    ways = Counter[str]()
    for seed in range(1, 120, 2):
        case = random_case(seed)
        if not (NO_SECOND_DERIVATIVE | HIDDEN) & case.kinds:
            ways[HessianOperator(case.objective()).method.split(",")[0]] += 1
    assert ways["graph"] > 0.95 * ways.total()
