"""Loops whose bounds are known only at run time, compiled or interpreted.

Triton 3.6's interpreter takes int() of a one-element array, which NumPy 2.4 refuses. Under the
interpreter `count` therefore unpacks its bounds itself; compiled, it is `tl.range`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def count(start, stop, step=1):
        """range(start, stop, step) of numbers or one-element tensors."""
        bounds = (start, stop, step)
        return range(
            *(int(b.handle.data.item()) if isinstance(b, tl.tensor) else b for b in bounds)
        )

else:
    count = tl.range
