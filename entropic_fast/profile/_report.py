"""The report of a model's profile, from what its tasks stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from .._utils import atomic_io as store
from .._utils.results import NOT_CONVERGED
from .._utils.table import Table
from ..experiments import _report as report
from ..experiments._task_store import TaskStore
from ..experiments.claims._intervals import mean_interval
from ..experiments.figures import _relaxation_runs as relaxation
from ..experiments.figures import fig2
from . import _figures as profile_figures
from ._subject import Subject
from ._tasks import BAND, CYCLES, PROFILE, place_of


def write(
    folder: TaskStore, subject: Subject, about: Mapping[str, Any]
) -> tuple[dict[str, Table], dict[str, dict[str, str]]]:
    """Tables, figures, summary and report of finished tasks.

    Returns:
        the tables by name, and at each point the way of each operator.
    """
    tables, ways = read(folder, subject)
    for name, table in tables.items():
        table.to_csv(folder.path / "data" / f"{name}.csv")
    entries = profile_figures.draw(folder, tables, str(about["loss"]))
    versions = store.read_sealed(folder.path / "environment.json")
    summary: dict[str, Any] = {**about, "environment": versions, "ways": ways}
    summary["seconds"] = folder.stage_seconds()
    for name in ("points", "eigenvalues", "path", "displacement"):
        if name in tables:
            summary[name] = tables[name].rows()
    store.write_json(folder.path / "summary.json", _jsonable(summary))
    report.page(
        folder.path,
        "profile.html.jinja",
        entries,
        about=about,
        subject=subject,
        points=[_shown(row) for row in tables["points"].rows()],
        eigenvalues=_eigenvalues(tables["eigenvalues"]),
        path=tables["path"].rows()[0] if "path" in tables else None,
        displacement=tables["displacement"].rows() if "displacement" in tables else [],
        ways=ways,
        environment=versions,
        stages=folder.stage_seconds(),
        configuration=json.dumps(about, indent=1),
        notes=_notes(subject, tables),
    )
    return tables, ways


def show(console: Console, points: Table, place: Path) -> None:
    """The points' numbers on the terminal, and where the report is."""
    shown = [_shown(row) for row in points.rows()]
    # A row a quantity: a terminal is narrow.
    table = RichTable(*("", *(cells["point"] for cells in shown)))
    for name in list(shown[0])[1:]:
        table.add_row(name, *(cells[name] for cells in shown))
    console.print(table)
    console.print(f"report: {place}", markup=False, highlight=False, soft_wrap=True)


def read(folder: TaskStore, subject: Subject) -> tuple[dict[str, Table], dict[str, dict[str, str]]]:
    """Tables and ways of finished tasks, as `write` returns them."""
    ways = {name: folder.document(f"spectra/{name}", "ways") for name in subject.places}
    return _tables(folder, subject), ways


def _tables(folder: TaskStore, subject: Subject) -> dict[str, Table]:
    """Every number of the report."""

    def stacked(name: str) -> Table:
        parts = [folder.table(f"spectra/{place}", name) for place in subject.places]
        return Table.from_rows([row for part in parts for row in part.rows()])

    tables = {name: stacked(name) for name in ("eigenvalues", "density")}
    if not subject.alone:
        tables["fisher"] = stacked("fisher")
    if subject.end is None:
        return {"points": stacked("point"), **tables}
    points = [
        {"point": row["point"], "s": place_of(folder, str(row["point"])), **row}
        for row in stacked("point").rows()
    ]
    curvature = folder.table(PROFILE, "curvature")
    trajectories = relaxation.collect(folder, [name.split("/")[1] for name in CYCLES])
    return {
        "points": Table.from_rows(points),
        "path": _path(folder),
        "curvature": curvature,
        "losses": fig2.both_losses(folder, BAND, "A-B"),
        **tables,
        "relaxation": trajectories,
        "bands": relaxation.bands(trajectories),
        "displacement": displacement(trajectories),
    }


def displacement(trajectories: Table) -> Table:
    """How far replicas moved along the path, by setting, with Student's 95 % interval."""
    rows = []
    for values, replicas in relaxation.by_setting(trajectories):
        moved = np.array([float(r["position"][-1] - r["position"][0]) for r in replicas])
        kept = moved[np.isfinite(moved)]
        low, high = mean_interval(kept)
        rows.append(
            {
                **values,
                "displacement": float(kept.mean()) if len(kept) else math.nan,
                "low": low,
                "high": high,
                "replicas": len(kept),
                "diverged": len(moved) - len(kept),
            }
        )
    return Table.from_rows(rows)


def _path(folder: TaskStore) -> Table:
    saddle, losses = folder.document(BAND, "saddle"), folder.table(BAND, "losses")
    line = folder.table(BAND, "line")
    row = {
        "pivots": int(losses["is_pivot"].sum()),
        "length_over_chord": float(saddle["length_over_chord"]),
        "saddle": float(saddle["position"]),
        "saddle_low": float(saddle["bracket"][0]),
        "saddle_high": float(saddle["bracket"][1]),
        "highest_loss": float(losses["loss"].max()),
        "highest_loss_of_line": float(line["loss"].max()),
        "loss_at_a": float(losses["loss"][0]),
        "loss_at_b": float(losses["loss"][-1]),
    }
    return Table.from_rows([row])


# -- words ----------------------------------------------------------------------------------


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A point's numbers as text: ± is a standard error, or an eigenvalue's residual."""

    def number(value: float) -> str:
        return f"{value:.4g}"

    def both(name: str, error: str) -> str:
        size = float(row[f"{name}_{error}"])
        # One probe has no standard error.
        return f"{row[name]:.4g} ± " + (f"{size:.2g}" if math.isfinite(size) else "unknown")

    cells = {"point": str(row["point"])}
    for name in ("s", "loss", "accuracy", "norm", "gradient_norm"):
        if name in row:
            cells[name.replace("_", " ")] = number(row[name])
    cells["Hessian trace"] = both("hessian_trace", "std_error")
    if "fisher_trace" in row:
        cells["Fisher trace"] = both("fisher_trace", "std_error")
    cells["largest eigenvalue"] = both("top_eigenvalue", "residual")
    if not row.get("top_eigenvalue_converged", 1):
        cells["largest eigenvalue"] += f", {NOT_CONVERGED}"
    cells["negative mass"] = both("negative_mass", "std_error")
    return cells


def _eigenvalues(table: Table) -> list[dict[str, str]]:
    return [
        {
            "point": str(row["point"]),
            "which": f"{row['which']} {row['rank']}" if row["which"] == "largest" else "smallest",
            "eigenvalue": f"{row['eigenvalue']:.4g}",
            "residual": f"{row['residual']:.2g}"
            + ("" if row.get("converged", row["all_converged"]) else f", {NOT_CONVERGED}"),
        }
        for row in table.rows()
    ]


def _notes(subject: Subject, tables: Mapping[str, Table]) -> list[str]:
    notes = []
    if subject.alone:
        notes.append(f"Nothing of single examples, so no Fisher matrix: {subject.alone}.")
    if subject.whole.has_running_statistics:
        notes.append(
            "Normalization layers keep the statistics that the model came with."
            if subject.end is None
            else "Statistics of normalization layers are re-estimated at every point, the ends "
            "too: for curvature on its examples, for losses on all. The path and the relaxation "
            "use each batch's own, as in training."
        )
    table = tables["eigenvalues"]
    searches = dict.fromkeys(
        (r["point"], r["which"]) for r in table.rows() if not r["all_converged"]
    )
    for point, which in searches:
        notes.append(
            f"At {point} not every one of the {which} eigenvalues met the tolerance; each is "
            "within its residual of an eigenvalue."
        )
    if "displacement" in tables:
        notes.append(
            "A path is a choice: descended longer, or with smaller batches, it is flatter. What "
            "relaxation shows depends on the temperature lr / B; what the control shows as well "
            "is no entropic force."
        )
        lost = int(tables["displacement"]["diverged"].sum())
        if lost:
            notes.append(f"{lost} replicas diverged and are left out; a lower lr keeps them.")
    return notes


def _jsonable(value: Any) -> Any:
    """JSON's values: it knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
