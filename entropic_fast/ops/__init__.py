"""Kernel families: schema, checks and dispatch of every compiled operation, one package per family.

In a family's package, `__init__` has its public functions, `checks` the arguments of each op as a
`NamedTuple`, and `reference`, `native` (C++ and CUDA C++) and `triton` one implementation each.
Start with `backend`, which chooses among these, and `projected_step`, the largest. Relies on
`_torch` and `_utils`.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):  # each package registers its family
    if _module.ispkg:
        import_module(f"{__name__}.{_module.name}")
