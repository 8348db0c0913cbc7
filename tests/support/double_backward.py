"""Products and quadratic forms of the graph against those of double backward."""

from __future__ import annotations

import torch

from entropic_fast.curvature import GGNOperator, HessianOperator, autograd_only
from entropic_fast.objective import Objective


def assert_those_of_double_backward(obj: Objective, count: int) -> None:
    """Compare `count` products, twice, and forms of both matrices, in float64."""
    vectors = torch.randn(obj.num_params, count, dtype=torch.float64)
    for make in (HessianOperator, GGNOperator):
        operator = make(obj)
        first = operator @ vectors
        assert operator.method == "graph"
        with autograd_only():
            expected = make(obj) @ vectors
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(operator @ vectors, expected, rtol=1e-9, atol=1e-11)
        forms = (vectors * expected).sum(0)
        torch.testing.assert_close(operator.quadratic_forms(vectors), forms, rtol=1e-9, atol=1e-11)
