"""Stochastic trace estimation, one module per estimator.

Start with `_trace` (`hessian_trace`, `operator_trace`). A module without an underscore holds an
estimator, registered by `@trace_estimator`; `method=`, its errors and the tests of common
properties read the registry.
"""

from importlib import import_module
from pkgutil import iter_modules

from ._registry import METHODS, TraceMethod, trace_estimator
from ._trace import DEFAULT_PROBES, hessian_trace, operator_trace

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DEFAULT_PROBES",
    "METHODS",
    "TraceMethod",
    "hessian_trace",
    "operator_trace",
    "trace_estimator",
]
