"""Estimators from operator products: traces, eigenvalues, densities, log-determinants.

Start with `_eigenvalues` and `trace`. Relies on `operators`.
"""
