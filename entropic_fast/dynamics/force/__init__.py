"""The entropic force on projected SGD: prediction, measured drift, and their comparison.

Start with `_point_force` (prediction) and `_drift` (measurement). Relies on `curvature` and
`dynamics.projected_sgd`.
"""
