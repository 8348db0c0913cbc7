"""Layer rules: a layer's input and the gradient of its output give single examples' gradients."""

from ._factored_grads import Piece, Rows, at_least_float32, packed_bytes
from ._intercept import Intercept, Sink, uses_by_rules
from ._reused import combined

__all__ = [
    "Intercept",
    "Piece",
    "Rows",
    "Sink",
    "combined",
    "at_least_float32",
    "packed_bytes",
    "uses_by_rules",
]
