"""Losses: per-example values, and their derivatives in the outputs in closed form.

Start with `_functions`, which makes a loss of a name, a torch module or a callable.
"""

from ._cross_entropy import CrossEntropy, NextToken
from ._elementwise import BinaryCrossEntropy, DiagonalLoss
from ._functions import NAMES, LossFunction, closed_form, hits, origin, output_hessian, widened
from ._reductions import ReducedLoss

__all__ = [
    "NAMES",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "DiagonalLoss",
    "LossFunction",
    "NextToken",
    "ReducedLoss",
    "closed_form",
    "hits",
    "origin",
    "output_hessian",
    "widened",
]
