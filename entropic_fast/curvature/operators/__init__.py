"""Linear operators: Hessian, Gauss-Newton, Fisher and Jacobian, never formed as matrices.

Start with `_linear_operator` (the protocol) and `_algebra` (the base class: checked products and
expressions such as `H + 0.1 * G`), then `_base` (the captured-graph fast path) and `_second_order`
(Hessian and Gauss-Newton). Relies on `hvp` and `per_example`.
"""
