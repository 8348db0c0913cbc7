"""Lines on a terminal."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no highlighting, no line breaks at the terminal's width."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
