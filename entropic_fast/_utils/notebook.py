"""Results as a notebook shows them: small tables, and small plots as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from . import plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40  # of a table; of a longer one the first and the last are shown
MOST_LINES = 32  # of a plot
MOST_POINTS = 200  # of a line


def number(value: object) -> str:
    """Six digits of a float; anything else as its text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def with_error(value: float, error: float) -> str:
    return f"{value:.6g} ± {error:.2g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A table as HTML; markup in the text is escaped."""
    hidden = len(rows) - MOST_ROWS
    if hidden > 0:
        half = MOST_ROWS // 2
        shown = [_row(row) for row in (*rows[:half], *rows[-half:])]
        text = f'<tr><td colspan="{len(columns)}">… {hidden} more rows …</td></tr>'
        shown.insert(half, text)
    else:
        shown = [_row(row) for row in rows]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(shown)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(rows: Sequence[tuple[str, object]], caption: str = "") -> str:
    """Names and their values as HTML, one per row."""
    return table(("", "value"), rows, caption)


def plot(draw: Callable[[Axes], None], width: float = 3.8, height: float = 2.3) -> str:
    """An SVG element of what `draw` puts on axes (sizes in inches); pyplot is not used."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plot_style.NOTEBOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].strip()  # without the prologue of a document


def _row(row: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<td>{escape(number(v))}</td>" for v in row) + "</tr>"
