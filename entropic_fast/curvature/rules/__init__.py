"""Layer rules: a layer's input and the gradient of its output give single examples' gradients."""

from .intercept import Intercept, Sink, reached_by_rules
from .pieces import Piece, Rows, full_precision, packed_bytes

__all__ = [
    "Intercept",
    "Piece",
    "Rows",
    "Sink",
    "full_precision",
    "packed_bytes",
    "reached_by_rules",
]
