"""Tasks of figure 2: curvature and spectra along the paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor

from ...._utils.convergence import held
from ...._utils.table import Table
from ....curvature import CurvatureSettings, curvature_at, score_spectrum, score_spectrum_floor
from ....objective import Objective
from ....paths import Path
from ....training.data import ImageData
from ... import _inputs
from ..._executor import Progress, Task
from ..._run_folder import RunFolder
from ..._sections import Count, Positive, Section
from ..._task_store import TaskStore

QUANTITIES = ("loss", "fisher_trace", "hessian_trace", "top_eigenvalue")


class Curvature(Section):
    """Curvature along the paths: at every pivot, and spectra at `spectrum_points` positions."""

    toml = "curvature"
    probes: Count = 16
    tol: Positive = 1e-2
    spectrum_examples: Count = 1024
    spectrum_points: Annotated[int, Field(ge=3)] = 5


def tasks(run: RunFolder) -> list[Task]:
    """One task for the curvature along each path; the spectrum along the first."""
    names = [name for name, *_ in _inputs.path_names(run)]
    cost = _inputs.curvature_work(run, run.config.path.pivots * (run.config[Curvature].probes + 10))
    found = [Task(f"curvature/{n}", measure, (n,), (f"path/{n}",), cost) for n in names]
    first = names[0]
    return [*found, Task(f"spectrum/{first}", spectrum, (first,), (f"path/{first}",), cost / 5)]


def measure(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Traces, largest eigenvalue and loss at every pivot of a path."""
    full = _inputs.objective(run, _inputs.minimum(run, _first_minimum(run, name)))
    path = _inputs.load_path(run, name)
    return {"profile": profile(run, progress, name, path, full, _inputs.images(run)[0])}


def profile(
    run: RunFolder, progress: Progress, name: str, path: Path, full: Objective, images: ImageData
) -> Table:
    """Traces, largest eigenvalue and loss at every pivot, on the first of some images."""
    section = run.config[Curvature]
    settings = CurvatureSettings(recalibrate=False, probes=section.probes, tol=section.tol)
    inputs = images.tensors(run.config.data.curvature_examples or None)
    rows, pairs = [], None
    for s, theta, obj in _along(run, progress, path, path.positions.tolist(), full, inputs):
        with held():  # columns say what is not converged
            point = curvature_at(
                obj, theta, QUANTITIES, settings=settings, seed=run.config.seed, start=pairs
            )
        pairs = point.pairs
        rows.append({"path": name, "s": s, **point.row})
    return Table.from_rows(rows)


def _along(
    run: RunFolder,
    progress: Progress,
    path: Path,
    positions: Sequence[float],
    full: Objective,
    inputs: tuple[Tensor, Tensor],
) -> Iterator[tuple[float, Tensor, Objective]]:
    """Points of a path with the loss there on `inputs`.

    Unlike `curvature_profile`, normalization statistics are re-estimated on the examples of `full`,
    of which `inputs` are some.
    """
    for i, s in enumerate(positions):
        theta = path.point(s)
        obj = full.recalibrated(theta, max_examples=_inputs.norm_examples(run))
        yield s, theta, obj.with_data(inputs)
        progress((i + 1) / len(positions))


def spectrum(run: RunFolder, progress: Progress, name: str) -> dict[str, Any]:
    """Eigenvalues of the score matrix's second moment at several positions of a path."""
    section = run.config[Curvature]
    training, _ = _inputs.images(run)
    full = _inputs.objective(run, _inputs.minimum(run, _first_minimum(run, name)))
    inputs = training.tensors(min(section.spectrum_examples, len(training)))
    path = _inputs.load_path(run, name)
    positions = np.linspace(0, 1, section.spectrum_points)
    rows: list[dict[str, object]] = []
    for s, theta, obj in _along(run, progress, path, positions.tolist(), full, inputs):
        values = score_spectrum(obj, theta)
        floor = score_spectrum_floor(values, obj.dtype)
        at = {"path": name, "s": s}
        rows += [
            {**at, "rank": rank, "eigenvalue": value, "above_floor": value > floor}
            for rank, value in enumerate(values.tolist(), 1)
        ]
    return {"eigenvalues": Table.from_rows(rows)}


def _first_minimum(run: RunFolder, name: str) -> int:
    return next(a for n, a, _, _ in _inputs.path_names(run) if n == name)


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    paths, saddles = _inputs.path_names(run), []
    for name, a, b, seed in paths:
        saddle = run.document(f"path/{name}", "saddle")
        saddles.append(
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
    names = [name for name, *_ in paths]
    losses = [both_losses(run, f"path/{name}", name) for name in names]
    return {
        "fig2_curvature": Table.concatenated(run.table(f"curvature/{n}", "profile") for n in names),
        "fig2_loss": Table.concatenated(losses),
        "fig2_paths": Table.from_rows(saddles),
        "fig2_spectrum": run.table(f"spectrum/{names[0]}", "eigenvalues"),
    }


def both_losses(store: TaskStore, task: str, name: str) -> Table:
    """The loss along a path that a task found, and along the straight line."""
    return Table.from_rows(
        [
            {"path": name, "kind": kind, "s": row["s"], "loss": row["loss"]}
            for kind, table in (("path", "losses"), ("line", "line"))
            for row in store.table(task, table).rows()
        ]
    )
