"""The command `entropic-fast`.

Start with `_main`, which defines the subcommands.
"""

from ._main import app, main

__all__ = ["app", "main"]
