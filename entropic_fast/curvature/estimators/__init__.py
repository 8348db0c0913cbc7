"""Estimators from operator products: traces, eigenvalues, densities, log-determinants.

Start with `_eigenvalues` and `trace`. Relies on `operators`.
"""

from ._block_lanczos import EXTRA_COLUMNS

__all__ = ["EXTRA_COLUMNS"]
