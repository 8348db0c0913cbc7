"""The figures' common look: color-blind-safe, legible when printed, PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..._utils import atomic_io as store
from ..._utils import plot_style
from ..._utils.plot_style import COLORS as COLORS
from ..._utils.plot_style import MARKERS as MARKERS
from ..._utils.results import NOT_CONVERGED
from ..._utils.table import Table
from ..claims._intervals import mean_interval

BAND = 1.96  # half-width of a 95 % band, in standard errors


@contextmanager
def look() -> Iterator[None]:
    """Draw in the figures' style."""
    with matplotlib.rc_context(plot_style.FIGURE):
        yield


def panels(
    rows: int, columns: int, width: float = 3.4, height: float = 2.7
) -> tuple[Figure, list[Axes]]:
    """A figure without a window system, and its axes row by row; sizes are inches per panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def mosaic(rows: list[str], width: float, height: float) -> tuple[Figure, dict[str, Axes]]:
    """Like `panels`, laid out by letters: each row of the grid is a string."""
    figure = Figure(figsize=(width * len(rows[0]), height * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplot_mosaic([list(row) for row in rows])


def letter(ax: Axes, name: str, title: str) -> None:
    """A panel's letter and title."""
    ax.set_title(f"{name}   {title}", loc="left")


def band(ax: Axes, x: np.ndarray, mean: np.ndarray, error: np.ndarray, color: str) -> None:
    """A 95 % band about a mean, from its standard error."""
    ax.fill_between(x, mean - BAND * error, mean + BAND * error, color=color, alpha=0.18, lw=0)


def errorbars(
    ax: Axes,
    x: Any,
    y: Any,
    error: Any,
    color: str,
    label: str,
    marker: str = "o",
    xerr: Any = None,
) -> None:
    """Points, joined if the marker is followed by a line's style, with error bars."""
    ax.errorbar(x, y, error, xerr, fmt=marker, color=color, capsize=2, label=label)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `name`.png (160 dpi) and `name`.svg, atomically and without a date."""
    # Laid out once for both files, and not again when it is drawn.
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)
    for kind, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        data = io.BytesIO()
        figure.savefig(data, format=kind, **options)
        store.write_bytes(folder / f"{name}.{kind}", data.getvalue())


def mark_unconverged(ax: Axes, table: Table, x: str, y: str, converged: str) -> None:
    """Crosses on the values of a column that another column says are not converged."""
    if converged not in table.columns:  # a run from before this column
        return
    bad = table[converged] == 0
    if bad.any():
        (cross,) = ax.plot(table[x][bad], table[y][bad], "x", color="black", ms=9, zorder=5)
        ax.legend([cross], [NOT_CONVERGED])


def log_if_wide(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis for values that span a decade; within one, it has too few ticks."""
    values = np.asarray(values, dtype=float)
    if values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")


def shades(count: int) -> list[tuple[float, float, float, float]]:
    """Ordered colors for an ordered quantity: viridis without its darkest and lightest colors."""
    places = np.linspace(0.25, 0.88, max(2, count))
    return [matplotlib.colormaps["viridis"](x) for x in places][:count]


def mean_and_points(
    ax: Axes, x: np.ndarray, values: np.ndarray, color: str, label: str = ""
) -> None:
    """The mean over rows of `values` [R, X] as a line, each row's values as points.

    From three rows on, a band is the mean's 95 % interval (Student's t), which may reach beyond
    the axis: that spans the points.
    """
    ax.plot(x, values.mean(0), "-", color=color, label=label or None)
    for row in values:
        ax.plot(x, row, "o", color=color, alpha=0.6)
    if len(values) > 2:
        spanned = ax.dataLim.frozen()
        low, high = np.transpose([mean_interval(column) for column in values.T])
        ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
        ax.dataLim.set(spanned)
