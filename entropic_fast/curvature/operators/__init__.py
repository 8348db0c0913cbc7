"""Linear operators: Hessian, Gauss-Newton, Fisher and Jacobian, never formed as matrices.

Start with `_linear_operator` (the protocol) and `_algebra` (the base class: checked products and
expressions such as `H + 0.1 * G`), then `_base` (the captured-graph fast path) and `_second_order`
(Hessian and Gauss-Newton). Relies on `hvp` and `per_example`.
"""

from ._algebra import ProjectedOperator, as_operator
from ._fisher import FisherOperator
from ._jacobian import JacobianOperator
from ._linear_operator import LinearOperator, NonFiniteProductError
from ._projection import orthonormal, without
from ._second_order import GGNOperator, HessianOperator

__all__ = [
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "NonFiniteProductError",
    "ProjectedOperator",
    "as_operator",
    "orthonormal",
    "without",
]
