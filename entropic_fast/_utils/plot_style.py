"""Colors, markers and matplotlib settings of figures and of plots in notebooks."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, without its yellow (too light on white).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_COMMON: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "entropic_fast",
}
NOTEBOOK: dict[Any, Any] = {**_COMMON, "font.size": 8.0, "lines.linewidth": 1.2}
FIGURE: dict[Any, Any] = {
    **_COMMON,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}
