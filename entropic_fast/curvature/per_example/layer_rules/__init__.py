"""Layer rules: per-example gradients from a layer's input and the gradient of its output.

A module without an underscore holds one kind of layer: its rule, registered by
`@layer_rule(torch function)`, and its factored gradient. A new file in this folder is enough for
models that use the layer. Start with `_base`; `_intercept` replaces calls of torch functions by
rules, `_reused` adds up the gradients of a parameter that several layers use.
"""

from importlib import import_module
from pkgutil import iter_modules

from ._base import (
    Backward,
    DenseGrad,
    FactoredGrad,
    LayerRule,
    at_least_float32,
    packed_bytes,
    squared_norms,
)
from ._intercept import LayerInterceptor, Sink, count_layer_rule_uses
from ._registry import LAYER_RULES, layer_rule
from ._reused import combined

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

__all__ = [
    "LAYER_RULES",
    "Backward",
    "DenseGrad",
    "FactoredGrad",
    "LayerRule",
    "LayerInterceptor",
    "Sink",
    "at_least_float32",
    "combined",
    "count_layer_rule_uses",
    "layer_rule",
    "packed_bytes",
    "squared_norms",
]
