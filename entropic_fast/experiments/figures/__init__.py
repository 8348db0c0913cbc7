"""The paper's figures and ours: one module or folder per figure, each exporting one `FIGURE`.

Start with `fig2`. `_style` is their common look; `_relaxation_runs` is what figures of projected
SGD have in common.
"""

from importlib import import_module
from pkgutil import iter_modules

from .._figure import Figure

__all__ = ["FIGURES"]

_FOUND = [module.name for module in iter_modules(__path__) if module.name[0] != "_"]
_NAMES = sorted(_FOUND, key=lambda name: (len(name), name))  # fig10 after fig9, "force" after both
_MODULES = [import_module(f"{__name__}.{name}") for name in _NAMES]
FIGURES: dict[str, Figure] = {module.FIGURE.name: module.FIGURE for module in _MODULES}
