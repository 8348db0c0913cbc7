"""Figure 2: curvature, loss and spectrum along minimum energy paths between minima."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..._utils.convergence import held
from ..._utils.table import Table
from ...curvature import (
    CurvatureSettings,
    curvature_at,
    score_spectrum,
    score_spectrum_floor,
)
from ...objective import Objective
from ...paths import AutoNEBConfig, Path, auto_neb, linear_path, path_losses
from .. import _inputs as pieces
from .._executor import Progress, Task
from .._run_folder import RunFolder
from .._task_store import TaskStore
from . import _style as plots

QUANTITIES = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue")
DISTANCE = "relative distance along the path"
Styles = dict[str, tuple[str, str, str]]  # of each path: color, marker, legend


def path_tasks(run: RunFolder) -> list[Task]:
    """One task for each pair of minima and AutoNEB seed."""
    section = run.config.path
    work = sum(section.steps) * section.pivots * section.batch_size
    return [
        Task(
            f"path/{name}",
            find_path,
            (a, b, seed),
            (f"train/{a}", f"train/{b}"),
            cost=work,
        )
        for name, a, b, seed in pieces.path_names(run)
    ]


def find_path(run: RunFolder, progress: Progress, a: int, b: int, seed: int) -> dict[str, Any]:
    """AutoNEB between two minima, and the loss along it and along the straight line."""
    objective = pieces.objective(run, pieces.minimum(run, a))
    end = pieces.objective(run, pieces.minimum(run, b)).parameters_vector()
    return connect(run, progress, objective, end, seed)


def connect(
    run: RunFolder, progress: Progress, objective: Objective, end: Tensor, seed: int
) -> dict[str, Any]:
    """AutoNEB from the objective's own point to another, as the run is configured."""
    section = run.config.path
    config = AutoNEBConfig(
        pivots=section.pivots,
        max_pivots=section.max_pivots,
        cycles=tuple(zip(section.steps, section.lrs, strict=True)),
        batch_size=section.batch_size,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        eval_points=3,
        recalibration_examples=pieces.norm_examples(run),
        seed=seed,
    )
    return connected(progress, objective, end, config, section.dense_points)


def connected(
    progress: Progress, objective: Objective, end: Tensor, config: AutoNEBConfig, line_points: int
) -> dict[str, Any]:
    """A minimum energy path from the objective's own point, with the losses beside it.

    Args:
        end: the other minimum.  # [P]
        line_points: where the loss is taken on the straight line, the ends not counted.
    """
    start = objective.parameters_vector()
    result = auto_neb(
        objective, start, end, config, on_step=lambda done, total, _: progress(0.9 * done / total)
    )
    line = path_losses(
        objective,
        linear_path(start, end),
        line_points,
        recalibration_examples=config.recalibration_examples,
    )
    saddle = result.saddle
    return {
        "pivots": {"pivots": result.path.pivots},
        "losses": result.losses,
        "history": result.history,
        "line": line,
        "saddle": {
            "position": saddle.position,
            "bracket": list(saddle.bracket),
            "loss": saddle.loss,
            "length_over_chord": result.path.length / float((end - start).norm()),
        },
    }


def curvature_tasks(run: RunFolder) -> list[Task]:
    """One task for the curvature along each path; the spectrum along the first."""
    names = [name for name, *_ in pieces.path_names(run)]
    cost = pieces.curvature_work(run, run.config.path.pivots * (run.config.curvature.probes + 10))
    tasks = [Task(f"curvature/{n}", measure, (n,), (f"path/{n}",), cost) for n in names]
    first = names[0]
    return [*tasks, Task(f"spectrum/{first}", spectrum, (first,), (f"path/{first}",), cost / 5)]


def measure(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Traces, largest eigenvalue and loss at every pivot of a path."""
    whole = pieces.objective(run, pieces.minimum(run, _first_minimum(run, name)))
    inputs = pieces.images(run)[0].tensors(run.config.data.curvature_examples or None)
    path = pieces.load_path(run, name)
    return {"profile": profile(run, progress, name, path, whole, whole.with_data(inputs))}


def profile(
    run: RunFolder, progress: Progress, name: str, path: Path, whole: Objective, some: Objective
) -> Table:
    """Traces, largest eigenvalue and loss at every pivot.

    Args:
        whole: where normalization statistics are taken from.
        some: the same loss on the examples that curvature is of.
    """
    inputs = some.tensors()
    section = run.config.curvature
    settings = CurvatureSettings(recalibrate=False, probes=section.probes, tol=section.tol)
    rows, pairs = [], None
    for i, s in enumerate(path.positions.tolist()):
        theta = path.point(s)
        here = whole.recalibrated(theta, max_examples=pieces.norm_examples(run))
        with held():  # columns say what is not converged
            found = curvature_at(
                *(here.with_data(inputs), theta, QUANTITIES),
                settings=settings,
                seed=run.config.seed,
                start=pairs,
            )
        pairs = found.pairs
        rows.append({"path": name, "s": s, **found.row})
        progress((i + 1) / path.num_pivots)
    return Table.from_rows(rows)


def spectrum(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Eigenvalues of the score matrix's second moment at several positions of a path."""
    section = run.config.curvature
    path = pieces.load_path(run, name)
    training, _ = pieces.images(run)
    whole = pieces.objective(run, pieces.minimum(run, _first_minimum(run, name)))
    inputs = training.tensors(min(section.spectrum_examples, len(training)))
    rows = []
    for i, s in enumerate(np.linspace(0, 1, section.spectrum_points)):
        theta = path.point(float(s))
        here = whole.recalibrated(theta, max_examples=pieces.norm_examples(run))
        here = here.with_data(inputs)
        values = score_spectrum(here, theta)
        floor = score_spectrum_floor(values, here.dtype)
        rows += [
            {
                "path": name,
                "s": float(s),
                "rank": rank + 1,
                "eigenvalue": value,
                "above_floor": value > floor,
            }
            for rank, value in enumerate(values.tolist())
        ]
        progress((i + 1) / section.spectrum_points)
    return {"eigenvalues": Table.from_rows(rows)}


def _first_minimum(run: RunFolder, name: str) -> int:
    return next(a for n, a, _, _ in pieces.path_names(run) if n == name)


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    curvature, losses, summaries = [], [], []
    for name, a, b, seed in pieces.path_names(run):
        curvature += run.table(f"curvature/{name}", "profile").rows()
        losses += both_losses(run, f"path/{name}", name).rows()
        saddle = run.document(f"path/{name}", "saddle")
        summaries.append(
            {
                "path": name,
                "from": a,
                "to": b,
                "neb_seed": seed,
                "saddle_position": saddle["position"],
                "saddle_low": saddle["bracket"][0],
                "saddle_high": saddle["bracket"][1],
                "saddle_loss": saddle["loss"],
                "length_over_chord": saddle["length_over_chord"],
            }
        )
    first = pieces.path_names(run)[0][0]
    return {
        "fig2_curvature": Table.from_rows(curvature),
        "fig2_loss": Table.from_rows(losses),
        "fig2_paths": Table.from_rows(summaries),
        "fig2_spectrum": run.table(f"spectrum/{first}", "eigenvalues"),
    }


def both_losses(store: TaskStore, task: str, name: str) -> Table:
    """The loss along a path that a task found, and along the straight line."""
    return Table.from_rows(
        [
            {"path": name, "kind": kind, "s": s, "loss": loss}
            for kind, table in (("path", "losses"), ("line", "line"))
            for s, loss in zip(
                *(store.table(task, table)[column].tolist() for column in ("s", "loss")),
                strict=True,
            )
        ]
    )


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A to D of the paper's figure 2."""
    figure, (trace, eigenvalue, loss, spectrum) = plots.panels(2, 2, width=4.4, height=3.1)
    styles = _styles(tables["fig2_paths"])
    draw_curvature(trace, eigenvalue, tables["fig2_curvature"], styles)
    trace.legend(title="minima, AutoNEB seed", title_fontsize=7.5, ncols=2)
    draw_losses(loss, tables["fig2_loss"], styles)
    draw_spectrum(spectrum, tables["fig2_spectrum"])
    plots.letter(spectrum, "D", f"spectrum along path {tables['fig2_spectrum']['path'][0]}")
    return figure


def draw_curvature(trace: Axes, eigenvalue: Axes, curvature: Table, styles: Styles) -> None:
    """Panels A and B: trace of the Hessian and its largest eigenvalue, by path."""
    for ax, column, error, label in (
        (trace, "hessian_trace", "hessian_trace_std_error", "Hessian trace"),
        (eigenvalue, "top_eigenvalue", "top_eigenvalue_residual", "largest Hessian eigenvalue"),
    ):
        for name, (color, marker, text) in styles.items():
            rows = curvature.where(path=name)
            ax.errorbar(
                rows["s"],
                rows[column],
                plots.BAND * rows[error],
                fmt=f"{marker}-",
                color=color,
                capsize=2,
                label=text,
            )
        if column == "top_eigenvalue":
            plots.mark_unconverged(ax, curvature, "s", column, "top_eigenvalue_converged")
        ax.set_xlabel(DISTANCE)
        ax.set_ylabel(label)
        if curvature[column].min() >= 0:
            ax.set_ylim(bottom=0)
    plots.letter(trace, "A", "trace of the Hessian (± 95 %)")
    plots.letter(eigenvalue, "B", "largest eigenvalue (± residual bound)")


def draw_losses(
    ax: Axes, table: Table, styles: Styles, label: str = "cross-entropy [nats]"
) -> None:
    """Panel C: the loss along the paths and the straight lines."""
    for name, (color, _, _) in styles.items():
        for kind, dash in (("path", "-"), ("line", ":")):
            rows = table.where(path=name, kind=kind)
            ax.plot(rows["s"], rows["loss"], dash, color=color)
    ax.plot([], [], "k-", label="minimum energy path")
    ax.plot([], [], "k:", label="straight line")
    ax.set_yscale("log")
    ax.set_xlabel(DISTANCE)
    ax.set_ylabel(label)
    ax.legend()
    plots.letter(ax, "C", "loss along the paths")


def draw_spectrum(ax: Axes, table: Table) -> None:
    """Panel D: eigenvalues of the score matrix by rank, a curve a position."""
    positions = sorted(set(table["s"].tolist()))
    for s, color in zip(positions, plots.shades(len(positions)), strict=True):
        rows = table.where(s=s, above_floor=True)
        ax.plot(rows["rank"], rows["eigenvalue"], color=color, label=f"s = {s:.2f}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue of the score matrix, σ²/E")
    ax.legend()


def _styles(paths: Table) -> Styles:
    """Color by pair of minima, marker by AutoNEB seed, as in the paper."""
    pairs = list(dict.fromkeys((r["from"], r["to"]) for r in paths.rows()))
    seeds = list(dict.fromkeys(paths["neb_seed"].tolist()))
    return {
        str(row["path"]): (
            plots.COLORS[pairs.index((row["from"], row["to"])) % len(plots.COLORS)],
            plots.MARKERS[seeds.index(row["neb_seed"]) % len(plots.MARKERS)],
            f"{row['from']}-{row['to']}, {row['neb_seed']}",
        )
        for row in paths.rows()
    }
