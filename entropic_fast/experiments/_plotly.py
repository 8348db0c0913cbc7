"""Convert a Matplotlib figure's panels to Plotly charts.

Lines, error bars, bands, points and meshes keep their colors and labels. Anything else, such as a
schematic, is in the report's SVG alone.
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
MARKERS = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond",
    "P": "cross", "X": "x", "x": "x-thin-open",
}  # fmt: skip
LABEL = 28  # characters of a vertical axis's label on one line
DIGITS = 7  # significant ones kept of every number

Trace = dict[str, Any]


def charts(figure: Figure) -> list[dict[str, Any]]:
    """A chart for each panel: Plotly's `data` and `layout`, and a `title`.

    A second axis (Matplotlib's twinx) joins the panel that it lies on; panels without axes and
    color bars are left out.

    >>> from entropic_fast.experiments.figures import _style as plots
    >>> figure, (ax,) = plots.panels(1, 1)
    >>> _ = ax.plot([0, 1], [2, 3], label="loss")
    >>> (chart,) = charts(figure)
    >>> chart["data"][0]["name"], chart["data"][0]["y"]
    ('loss', [2.0, 3.0])
    """
    found: dict[tuple[float, ...], dict[str, Any]] = {}
    for ax in figure.axes:
        if not ax.axison or not ax.has_data() or ax.get_label() == "<colorbar>":
            continue
        place = tuple(ax.get_position(original=True).bounds)
        first = found.get(place)
        if first is None:
            found[place] = _chart(ax)
        else:
            first["layout"]["yaxis2"] = _axis(ax, "y") | {"overlaying": "y", "side": "right"}
            first["data"] += [trace | {"yaxis": "y2"} for trace in _traces(ax)]
    return sorted(found.values(), key=lambda chart: str(chart["title"])[:1])  # by panel's letter


def as_json(value: Any) -> str:
    """JSON for a script element, which a `<` could end."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _chart(ax: Axes) -> dict[str, Any]:
    layout: dict[str, Any] = {"xaxis": _axis(ax, "x"), "yaxis": _axis(ax, "y")}
    if ax.get_aspect() == 1.0:
        layout["yaxis"]["scaleanchor"] = "x"
    levels = [line.get_ydata() for line in ax.lines if _is_level(ax, line)]
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y,
         "line": {"width": 1, "color": "#999999"}}
        for y in (float(np.asarray(level)[0]) for level in levels)
    ]  # fmt: skip
    return {"title": plain(ax.get_title(loc="left")), "data": _traces(ax), "layout": layout}


def plain(text: str) -> str:
    r"""A label without the markup of Matplotlib's formulas.

    >>> plain(r"velocity [$\mathdefault{10^{-3}}$]")
    'velocity [10^-3]'
    """
    return re.sub(r"\\mathdefault|[${}]", "", text)


def _axis(ax: Axes, name: str) -> dict[str, Any]:
    axis = ax.xaxis if name == "x" else ax.yaxis
    low, high = sorted(ax.get_xlim() if name == "x" else ax.get_ylim())
    scale = axis.get_scale()
    label = plain(axis.get_label_text())
    if name == "y":  # a panel is lower than it is wide
        label = "<br>".join(textwrap.wrap(label, LABEL))
    found: dict[str, Any] = {"title": {"text": label}}
    found["exponentformat"] = "power"
    if scale == "log":
        if high > 30 * low:  # powers of ten alone
            found["dtick"] = 1
        return found | {"type": "log", "range": [float(np.log10(low)), float(np.log10(high))]}
    ends = axis.get_transform().transform(np.array([low, high], dtype=float))
    found["range"] = [float(end) for end in ends]
    if scale != "linear" or isinstance(axis.get_major_locator(), FixedLocator):
        ticks = axis.get_majorticklocs()
        places = axis.get_transform().transform(np.asarray(ticks, dtype=float)).tolist()
        labels = axis.get_major_formatter().format_ticks(list(ticks))
        shown = [(p, plain(t)) for p, t in zip(places, labels, strict=True) if t]
        found |= {"tickvals": [p for p, _ in shown], "ticktext": [t for _, t in shown]}
    return found


def _traces(ax: Axes) -> list[Trace]:
    bars = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
    parts: set[Any] = set()
    for container in bars:
        line, caps, errors = container.lines
        parts |= {*([line] if line is not None else []), *caps, *errors}
    found = [trace for c in ax.collections if c not in parts for trace in _collection(ax, c)]
    found += [_line(ax, line) for line in ax.lines if line not in parts and not _is_level(ax, line)]
    return found + [_errorbar(ax, container) for container in bars]


def _is_level(ax: Axes, line: Line2D) -> bool:
    return line.get_transform() is ax.get_yaxis_transform(which="grid")


def _numbers(ax: Axes, values: Any, name: str) -> list[float | None]:
    """Coordinates on the chart's axis; None for those that are not finite."""
    array: Any = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    axis = ax.xaxis if name == "x" else ax.yaxis
    if axis.get_scale() not in ("linear", "log"):
        array = axis.get_transform().transform(array)
    return [float(f"{v:.{DIGITS}g}") if np.isfinite(v) else None for v in array.ravel()]


def _named(label: Any) -> dict[str, Any]:
    text = str(label)
    if not text or text.startswith("_"):
        return {"showlegend": False, "name": ""}
    return {"name": plain(text), "showlegend": True}


def _color(value: Any) -> dict[str, Any]:
    """Color and opacity; black and gray become "ink", the color of the page's text."""
    red, green, blue, alpha = to_rgba(value)
    gray = max(red, green, blue) - min(red, green, blue) < 0.02 and red < 0.7
    return {"color": "ink" if gray else to_hex((red, green, blue)), "opacity": round(alpha, 3)}


def _line(ax: Axes, line: Line2D) -> Trace:
    marker, style = str(line.get_marker()), str(line.get_linestyle())
    shown = [m for m, on in (("lines", style in DASHES), ("markers", marker in MARKERS)) if on]
    color = _color(line.get_color())
    alpha = line.get_alpha()
    return {
        "type": "scatter",
        "x": _numbers(ax, line.get_xdata(), "x"),
        "y": _numbers(ax, line.get_ydata(), "y"),
        "mode": "+".join(shown) or "lines",
        "opacity": float(alpha) if alpha is not None else color["opacity"],
        "line": {
            "color": color["color"],
            "width": float(line.get_linewidth()) * 1.3,
            "dash": DASHES.get(style, "solid"),
        },
        "marker": {
            "color": color["color"],
            "symbol": MARKERS.get(marker, "circle"),
            "size": float(line.get_markersize()) * 1.4,
        },
        **_named(line.get_label()),
    }


def _errorbar(ax: Axes, container: ErrorbarContainer) -> Trace:
    line, _, errors = container.lines
    trace = _line(ax, line) | _named(container.get_label())
    directions = [
        name for name, has in (("x", container.has_xerr), ("y", container.has_yerr)) if has
    ]
    for name, bars in zip(directions, errors, strict=True):
        column, segments = "xy".index(name), [np.asarray(s) for s in bars.get_segments()]
        ends = np.array([s[:, column] if len(s) == 2 else [np.nan, np.nan] for s in segments])
        low, high = (np.array(_numbers(ax, e, name), dtype=float) for e in ends.reshape(-1, 2).T)
        middle = np.array(trace[name], dtype=float)
        if len(middle) == len(low):
            trace[f"error_{name}"] = {
                "type": "data",
                "symmetric": False,
                "array": _finite(high - middle),
                "arrayminus": _finite(middle - low),
                "thickness": 1.2,
                "width": 3,
            }
    return trace


def _finite(values: Any) -> list[float]:
    return [float(f"{v:.{DIGITS}g}") if np.isfinite(v) else 0.0 for v in values]


def _collection(ax: Axes, shown: Any) -> list[Trace]:
    if isinstance(shown, QuadMesh):
        return [_mesh(ax, shown)]
    if isinstance(shown, PathCollection):
        return [_points(ax, shown)]
    if isinstance(shown, PolyCollection):
        return [_band(ax, shown, path.vertices) for path in shown.get_paths()]
    if isinstance(shown, LineCollection):
        color = _color(shown.get_colors()[0])
        return [
            {
                "type": "scatter",
                "mode": "lines",
                "x": _numbers(ax, segment[:, 0], "x"),
                "y": _numbers(ax, segment[:, 1], "y"),
                "line": {"color": color["color"], "width": 1},
                **_named("_"),
            }
            for segment in map(np.asarray, shown.get_segments())
        ]
    return []


def _band(ax: Axes, shown: PolyCollection, outline: Any) -> Trace:
    color = _color(shown.get_facecolor()[0])
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _numbers(ax, outline[:, 0], "x"),
        "y": _numbers(ax, outline[:, 1], "y"),
        "fill": "toself",
        "fillcolor": color["color"],
        "opacity": color["opacity"],
        "line": {"width": 0},
        "hoverinfo": "skip",
        **_named("_"),
    }


def _points(ax: Axes, shown: PathCollection) -> Trace:
    offsets = np.asarray(shown.get_offsets())
    colors = [to_hex(c) for c in shown.to_rgba(np.asarray(shown.get_array()))]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": _numbers(ax, offsets[:, 0], "x"),
        "y": _numbers(ax, offsets[:, 1], "y"),
        "marker": {"color": colors, "size": 5},
        **_named(shown.get_label()),
    }


def _mesh(ax: Axes, shown: QuadMesh) -> Trace:
    corners = np.asarray(shown.get_coordinates(), dtype=float)
    centers = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    values = np.asarray(shown.get_array(), dtype=float).reshape(centers.shape[:2])
    steps = np.linspace(0, 1, 9)
    return {
        "type": "heatmap",
        "x": _numbers(ax, centers[0, :, 0], "x"),
        "y": _numbers(ax, centers[:, 0, 1], "y"),
        "z": [[float(f"{v:.3g}") for v in row] for row in values],
        "colorscale": [[float(s), to_hex(shown.get_cmap()(s))] for s in steps],
        "hoverinfo": "x+y+z",
        "colorbar": {"thickness": 10},
    }
