"""Linear operators: Hessian, Gauss-Newton, Fisher and Jacobian, never formed as matrices.

Start with `_linear_operator` (the protocol) and `_second_order` (Hessian and Gauss-Newton).
Relies on `hvp` and `per_example`.
"""
