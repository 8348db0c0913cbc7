"""Drawing of figures 5, 6 and 7."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...._utils.table import Table
from .. import _style


def draw(tables: dict[str, Table], name: str = "fig5") -> Figure:
    """Panels A to D of the paper's figure 5."""
    lines, instability = tables[f"{name}_lines"], tables[f"{name}_instability"]
    figure, axes = _style.mosaic(["ACD", "BcD"], width=3.9, height=2.7)
    schematic, mean, loss, eigenvalue, unstable = (axes[name] for name in "ABCcD")
    _draw_schematic(schematic)
    k_values, seeds = (sorted(lines.group_by(name)) for name in ("k", "seed"))
    at = lines.group_by("seed", "k")

    averages = np.array([[at[s, k]["loss"].mean() for k in k_values] for s in seeds])
    _style.mean_and_points(mean, np.array(k_values), averages, _style.COLORS[0])
    mean.set_ylabel("mean loss on the line [nats]")
    _style.letter(mean, "B", "loss on the line")

    shades = _style.shades(len(k_values))
    for column, ax in (("loss", loss), ("eigenvalue", eigenvalue)):
        for shade, k in zip(shades, k_values, strict=True):
            x = at[seeds[0], k]["point"]
            y = np.mean([at[s, k][column] for s in seeds], axis=0)
            ax.plot(x, y, "o-", color=shade, label=f"k = {k}")
            if column == "eigenvalue" and "converged" in lines.columns:
                met = np.min([at[s, k]["converged"] for s in seeds], axis=0)
                means = Table({"x": x, "y": y, "met": met})
                _style.mark_unconverged(ax, means, "x", "y", "met")
        ax.set_xlabel("position on the line")
        _style.log_if_wide(ax, lines[column])
    loss.legend()
    loss.set_ylabel("loss [nats]")
    eigenvalue.set_ylabel("largest Hessian eigenvalue")
    _style.letter(loss, "C", "loss along the line")
    _style.letter(eigenvalue, "C", "curvature along the line")

    for column, color, label in (
        ("loss_instability", _style.COLORS[0], "loss"),
        ("eigenvalue_instability", _style.COLORS[1], "largest eigenvalue"),
    ):
        values = np.array([instability.where(seed=s)[column] for s in seeds])
        _style.mean_and_points(unstable, np.array(k_values), values, color, label)
    if max(float(instability[f"{name}_instability"].max()) for name in ("loss", "eigenvalue")) > 1:
        unstable.set_yscale("symlog", linthresh=0.1)
    unstable.set_ylabel("instability (relative rise)")
    unstable.legend()
    _style.letter(unstable, "D", "instability")
    for ax in (mean, unstable):
        ax.set(xlabel="branching epoch k")
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks(k_values, [str(k) for k in k_values])
    return figure


def _draw_schematic(ax: Axes) -> None:
    ax.axis("off")
    ax.set_xlim(-0.05, 1.05)
    ax.set_ylim(-0.05, 1.05)
    for start, end, bend in (
        ((0.0, 0.5), (0.45, 0.5), 0.0),
        ((0.45, 0.5), (0.95, 0.9), -0.25),
        ((0.45, 0.5), (0.95, 0.1), 0.25),
    ):
        arrow = {"arrowstyle": "-|>", "lw": 1.5, "color": "#444444"}
        bent = {**arrow, "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", end, start, arrowprops=bent)
    ax.plot([0.95, 0.95], [0.87, 0.13], "--", color=_style.COLORS[1], lw=1.5)
    for x, y, text, side in (
        (0.0, 0.56, "start", "left"),
        (0.37, 0.38, "epoch k", "center"),
        (0.6, 0.93, "data order 1", "center"),
        (0.6, 0.04, "data order 2", "center"),
        (0.91, 0.5, "straight line", "right"),
    ):
        ax.text(x, y, text, ha=side, fontsize=8)
    _style.letter(ax, "A", "branch, then connect")
