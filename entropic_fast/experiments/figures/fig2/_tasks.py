"""Figure 2: curvature, loss and spectrum along minimum energy paths between minima."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ...._utils.convergence import held
from ...._utils.table import Table
from ....curvature import (
    CurvatureSettings,
    curvature_at,
    score_spectrum,
    score_spectrum_floor,
)
from ....objective import Objective
from ....paths import Path
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
    whole = _inputs.objective(run, _inputs.minimum(run, _first_minimum(run, name)))
    inputs = _inputs.images(run)[0].tensors(run.config.data.curvature_examples or None)
    path = _inputs.load_path(run, name)
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
    section = run.config[Curvature]
    settings = CurvatureSettings(recalibrate=False, probes=section.probes, tol=section.tol)
    rows, pairs = [], None
    for i, s in enumerate(path.positions.tolist()):
        theta = path.point(s)
        here = whole.recalibrated(theta, max_examples=_inputs.norm_examples(run))
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
    section = run.config[Curvature]
    path = _inputs.load_path(run, name)
    training, _ = _inputs.images(run)
    whole = _inputs.objective(run, _inputs.minimum(run, _first_minimum(run, name)))
    inputs = training.tensors(min(section.spectrum_examples, len(training)))
    rows = []
    for i, s in enumerate(np.linspace(0, 1, section.spectrum_points)):
        theta = path.point(float(s))
        here = whole.recalibrated(theta, max_examples=_inputs.norm_examples(run))
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
    return next(a for n, a, _, _ in _inputs.path_names(run) if n == name)


def collect(run: RunFolder) -> dict[str, Table]:
    """The numbers behind the figure."""
    curvature, losses, summaries = [], [], []
    for name, a, b, seed in _inputs.path_names(run):
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
    first = _inputs.path_names(run)[0][0]
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
