"""Layer rules: a layer's input and the gradient of its output give single examples' gradients."""

from ._factored_grads import DenseGrad, FactoredGrad, at_least_float32, packed_bytes
from ._intercept import LayerInterceptor, Sink, count_layer_rule_uses
from ._reused import combined

__all__ = [
    "LayerInterceptor",
    "FactoredGrad",
    "DenseGrad",
    "Sink",
    "combined",
    "at_least_float32",
    "packed_bytes",
    "count_layer_rule_uses",
]
