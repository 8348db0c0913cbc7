"""Drawing of figure 1."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from ...._utils.table import Table
from .. import _style
from ._tasks import RIDGE, RING


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A (ring and its angular density) and B (ridge) of the paper's figure 1."""
    figure, (potential, density, track, mean) = _style.panels(2, 2, width=4.2, height=3.1)
    hot = float(tables["fig1_ring"]["temperature"].max())
    _draw_ring(potential)
    _draw_density(density, tables["fig1_ring"])
    _draw_track(track, tables["fig1_track"])
    _draw_mean(mean, tables["fig1_ridge"])
    _style.letter(potential, "A", "ring potential, V = ½ g(θ) (r - 1)²")
    _style.letter(density, "A", f"angular density (T = 0 and {hot:g})")
    _style.letter(track, "B", "a particle on a ridge, V = ½ g(y) x²")
    _style.letter(mean, "B", "drift to the broad side")
    return figure


def _draw_ring(ax: Axes) -> None:
    grid = torch.linspace(-1.6, 1.6, 161, dtype=torch.float64)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    energy = RING(torch.stack((x.flatten(), y.flatten()), 1)).reshape(x.shape)
    shown = _shade(ax, x, y, energy, 2.0)
    angle = torch.linspace(0, 2 * math.pi, 200)
    ax.plot(torch.cos(angle).numpy(), torch.sin(angle).numpy(), "w--", lw=1)
    for x0, text in ((1.0, "stiff"), (-1.0, "flat")):
        box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5}
        ax.text(x0, 0.0, text, ha="center", va="center", fontsize=8, bbox=box)
    ax.set_aspect("equal")
    ax.set(xlabel="x", ylabel="y")
    ax.figure.colorbar(shown, ax=ax, label="V (clipped at 2)")


def _shade(ax: Axes, x: Tensor, y: Tensor, energy: Tensor, top: float) -> QuadMesh:
    """A potential as an image, clipped at `top`; contours would leave seams in the SVG."""
    return ax.pcolormesh(
        x.numpy(), y.numpy(), energy.clamp(max=top).numpy(), cmap="cividis_r", rasterized=True
    )


def _draw_density(ax: Axes, table: Table) -> None:
    groups = sorted(table.group_by("temperature").items())
    for (temperature, rows), color in zip(groups, _style.COLORS, strict=False):
        x, y, error = rows["angle"], rows["density"], _style.BAND * rows["std_error"]
        _style.errorbars(ax, x, y, error, color, f"simulated, T = {temperature:g}")
        ax.plot(x, rows["analytic"], "-", color=color, label=f"analytic, T = {temperature:g}")
    ax.set(xlabel="angle θ [rad] (0 is stiff, ±π is flat)", ylabel="density P(θ) [1/rad]")
    ax.set_ylim(bottom=0)
    ax.legend()


def _draw_track(ax: Axes, table: Table) -> None:
    y = torch.linspace(-0.2, RIDGE.length + 0.2, 120, dtype=torch.float64)
    x = torch.linspace(-1.2, 1.2, 121, dtype=torch.float64)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="xy")
    energy = RIDGE(torch.stack((grid_x.flatten(), grid_y.flatten()), 1)).reshape(grid_x.shape)
    _shade(ax, grid_y, grid_x, energy, 1.0)
    ax.plot(table["y"], table["x"], color="#ffffff", lw=0.4, alpha=0.5)
    shown = ax.scatter(table["y"], table["x"], c=table["time"], cmap="plasma", s=8, zorder=3)
    ax.figure.colorbar(shown, ax=ax, label="time")
    ax.set(xlabel="y, along the ridge (stiff to broad)", ylabel="x, across")


def _draw_mean(ax: Axes, table: Table) -> None:
    ax.plot(table["time"], table["mean"], "-", color=_style.COLORS[0], label="mean of particles")
    _style.band(ax, table["time"], table["mean"], table["std_error"], _style.COLORS[0])
    early = table["time"] <= 0.4 * table["time"].max()
    line = float(table["mean"][0]) + table["force"][early] * table["time"][early]
    ax.plot(table["time"][early], line, "k--", label="force of V_eff = (T/2) ln g")
    ax.set(xlabel="time", ylabel="mean y")
    ax.legend()
