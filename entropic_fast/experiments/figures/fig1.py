"""Figure 1: toys in which curvature alone produces a force (ring and ridge)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from ..._utils.table import Table
from ...dynamics import (
    LangevinIntegrator,
    LangevinRecording,
    RidgePotential,
    RingPotential,
    simulate_langevin,
)
from ...ops.random_bits.streams import fold_in, uniform
from .._executor import Progress, Task
from .._run_folder import RunFolder
from . import _style as plots

BINS = 24  # of the angle
RING = RingPotential(stiffness=20.0, contrast=0.8)
# d ln g / dy = -1; long enough that the walls are not felt at first.
RIDGE = RidgePotential(stiff=100.0, broad=100.0 * math.exp(-7.0), length=7.0)
RIDGE_START = 2.5


def tasks(run: RunFolder) -> list[Task]:
    """The ring without and with noise, and the ridge."""
    # Nanoseconds each, where an example of the network takes tens of microseconds.
    cost = run.config.langevin.particles * run.config.langevin.steps / 5000
    return [
        Task("langevin/ring-cold", ring, (0.0,), cost=cost),
        Task("langevin/ring-hot", ring, (run.config.langevin.temperature,), cost=cost),
        Task("langevin/ridge", ridge, cost=cost),
    ]


def ring(run: RunFolder, progress: Progress, temperature: float) -> dict[str, Any]:
    """Angular histogram of independent particles, started uniformly in angle near r = 1."""
    section = run.config.langevin
    seed = fold_in(run.config.seed, "toy", "ring", str(temperature))
    draw = uniform((section.particles, 2), seed)
    # Started off the ring, so that at T = 0 too there is something to relax; not by much, as the
    # way back turns a particle in the second order, which a million of them show.
    start = RING.on_ring(2 * math.pi * draw[:, 0], 0.9 + 0.2 * draw[:, 1])
    integrator = LangevinIntegrator(temperature, section.dt)
    final = simulate_langevin(RING, start, integrator, section.steps, seed=seed).final
    progress(1.0)
    angle = torch.atan2(final[:, 1], final[:, 0]).numpy()
    edges = np.linspace(-math.pi, math.pi, BINS + 1)
    count = np.histogram(angle, edges)[0]
    middle = (edges[:-1] + edges[1:]) / 2
    fine = torch.from_numpy(np.linspace(edges[:-1], edges[1:], 33))  # [33, BINS]
    share = np.trapezoid(RING.analytic_density(temperature, fine).numpy(), fine.numpy(), axis=0)
    width = edges[1] - edges[0]
    return {
        "density": Table(
            {
                "temperature": [temperature] * BINS,
                "angle": middle,
                "stiffness": RING.stiffness(torch.from_numpy(middle)).numpy(),
                "count": count,
                "expected": share * section.particles,
                "density": count / section.particles / width,
                "std_error": np.sqrt(np.maximum(count, 1)) / section.particles / width,
                "analytic": share / width,
            }
        ),
        "sample": {"positions": final[:400].contiguous()},
    }


def ridge(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Particles released on the stiff side of the ridge: their mean, and a typical one's track."""
    section = run.config.langevin
    seed = fold_in(run.config.seed, "toy", "ridge")
    start = torch.zeros(section.particles, 2, dtype=torch.float64)
    start[:, 1] = RIDGE_START
    integrator = LangevinIntegrator(section.ridge_temperature, section.dt)
    every = max(1, section.steps // 100)

    def moments(positions: Tensor) -> Tensor:
        y = positions[:, 1]
        return torch.stack((y.mean(), y.std() / math.sqrt(len(y))))

    # All positions of a million particles at all records would be gigabytes.
    result = simulate_langevin(
        RIDGE,
        start,
        integrator,
        section.steps,
        seed=seed,
        recording=LangevinRecording(every, moments),
    )
    progress(1.0)
    assert result.observed is not None
    times, (means, errors) = result.times.tolist(), result.observed.T
    # A typical particle to show: the one that ends nearest to the mean, run again alone.
    typical = int((result.final[:, 1] - means[-1]).abs().argmin())
    track = simulate_langevin(
        RIDGE,
        start[:1],
        integrator,
        section.steps,
        seed=seed,
        recording=LangevinRecording(every),
        first_particle=typical,
    )
    x, slow = track.positions[:, 0].T.tolist()
    mean = Table(
        {
            "time": times,
            "mean": means.numpy(),
            "std_error": errors.numpy(),
            "force": [RIDGE.effective_force(section.ridge_temperature)] * len(times),
        }
    )
    return {"mean": mean, "track": Table({"time": times, "x": x, "y": slow})}


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    rows = [
        row
        for task in ("ring-cold", "ring-hot")
        for row in run.table(f"langevin/{task}", "density").rows()
    ]
    return {
        "fig1_ring": Table.from_rows(rows),
        "fig1_ridge": run.table("langevin/ridge", "mean"),
        "fig1_track": run.table("langevin/ridge", "track"),
    }


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A (ring and its angular density) and B (ridge) of the paper's figure 1."""
    figure, (potential, density, track, mean) = plots.panels(2, 2, width=4.2, height=3.1)
    hot = float(tables["fig1_ring"]["temperature"].max())
    _draw_ring(potential)
    _draw_density(density, tables["fig1_ring"])
    _draw_track(track, tables["fig1_track"])
    _draw_mean(mean, tables["fig1_ridge"])
    plots.letter(potential, "A", "ring potential, V = ½ g(θ) (r - 1)²")
    plots.letter(density, "A", f"angular density (T = 0 and {hot:g})")
    plots.letter(track, "B", "a particle on a ridge, V = ½ g(y) x²")
    plots.letter(mean, "B", "drift to the broad side")
    return figure


def _draw_ring(ax: Axes) -> None:
    grid = torch.linspace(-1.6, 1.6, 161, dtype=torch.float64)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    energy = RING(torch.stack((x.flatten(), y.flatten()), 1)).reshape(x.shape)
    shown = _shade(ax, x, y, energy, 2.0)
    angle = torch.linspace(0, 2 * math.pi, 200)
    ax.plot(torch.cos(angle).numpy(), torch.sin(angle).numpy(), "w--", lw=1)
    for x0, text in ((1.0, "stiff"), (-1.0, "flat")):
        ax.text(
            x0,
            0.0,
            text,
            ha="center",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
        )
    ax.set_aspect("equal")
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    ax.figure.colorbar(shown, ax=ax, label="V (clipped at 2)")


def _shade(ax: Axes, x: Tensor, y: Tensor, energy: Tensor, top: float) -> QuadMesh:
    """A potential as an image, clipped at `top`; as contours its SVG would show seams."""
    return ax.pcolormesh(
        x.numpy(), y.numpy(), energy.clamp(max=top).numpy(), cmap="cividis_r", rasterized=True
    )


def _draw_density(ax: Axes, table: Table) -> None:
    for temperature, color in zip(
        sorted(set(table["temperature"].tolist())), plots.COLORS, strict=False
    ):
        rows = table.where(temperature=temperature)
        ax.errorbar(
            rows["angle"],
            rows["density"],
            plots.BAND * rows["std_error"],
            fmt="o",
            color=color,
            capsize=2,
            label=f"simulated, T = {temperature:g}",
        )
        ax.plot(
            rows["angle"],
            rows["analytic"],
            "-",
            color=color,
            label=f"analytic, T = {temperature:g}",
        )
    ax.set_xlabel("angle θ [rad] (0 is stiff, ±π is flat)")
    ax.set_ylabel("density P(θ) [1/rad]")
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
    ax.set_xlabel("y, along the ridge (stiff to broad)")
    ax.set_ylabel("x, across")


def _draw_mean(ax: Axes, table: Table) -> None:
    ax.plot(table["time"], table["mean"], "-", color=plots.COLORS[0], label="mean of particles")
    plots.band(ax, table["time"], table["mean"], table["std_error"], plots.COLORS[0])
    start = float(table["mean"][0])
    early = table["time"] <= 0.4 * table["time"].max()
    ax.plot(
        table["time"][early],
        start + table["force"][early] * table["time"][early],
        "k--",
        label="force of V_eff = (T/2) ln g",
    )
    ax.set_xlabel("time")
    ax.set_ylabel("mean y")
    ax.legend()
