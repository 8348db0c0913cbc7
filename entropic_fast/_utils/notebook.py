"""Results as a notebook shows them: small tables, and small plots as inline SVG.

Results of every kind import this module, and it imports none of them; matplotlib is imported when
something is drawn.
"""

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
    """Six digits of a float; anything else as its text.

    >>> number(1 / 3), number(3), number("sgd")
    ('0.333333', '3', 'sgd')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def with_error(value: float, error: float) -> str:
    """A value and its error, as text.

    >>> with_error(2.5, 0.25)
    '2.5 ± 0.25'
    """
    return f"{value:.6g} ± {error:.2g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A table as HTML. Everything given is text: what is markup in it is escaped.

    >>> "<th>&lt;a&gt;</th>" in table(["<a>"], [[0.5]])
    True
    """
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
    """Names and their values as HTML, one a row."""
    return table(("", "value"), rows, caption)


def plot(draw: Callable[[Axes], None], width: float = 3.8, height: float = 2.3) -> str:
    """What `draw` puts on a pair of axes (sizes in inches) as an SVG element.

    No window system is asked for, and the state of `matplotlib.pyplot` is left alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plot_style.NOTEBOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].strip()  # without the prologue of a document of its own


def _row(row: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<td>{escape(number(v))}</td>" for v in row) + "</tr>"
