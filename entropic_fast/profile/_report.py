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
from .._utils.terminal import say
from ..experiments import TaskStore
from ..experiments import _report as report
from ..experiments.claims._intervals import mean_interval, normal_interval
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
        the tables by name, and for each point the method of each operator.
    """
    tables, methods = read(folder, subject)
    for name, table in tables.items():
        table.to_csv(folder.path / "data" / f"{name}.csv")
    entries = profile_figures.draw(folder, tables, str(about["loss"]))
    versions = store.read_sealed(folder.path / "environment.json")
    summary: dict[str, Any] = {**about, "environment": versions, "methods": methods}
    summary["seconds"] = folder.stage_seconds()
    for name in ("points", "eigenvalues", "path", "displacement"):
        if name in tables:
            summary[name] = tables[name].rows()
    store.write_json(folder.path / "summary.json", _jsonable(summary))
    report.page(
        folder.path,
        "profile.html.jinja",
        entries,
        _findings(tables),
        about=about,
        verdict=_verdict(tables),
        subject=subject,
        points=[_shown(row) for row in tables["points"].rows()],
        eigenvalues=_eigenvalues(tables["eigenvalues"]),
        path=tables["path"].rows()[0] if "path" in tables else None,
        methods=methods,
        environment=versions,
        stages=folder.stage_seconds(),
        configuration=json.dumps(about, indent=1),
        notes=_notes(subject, tables),
    )
    return tables, methods


def show(console: Console, points: Table, place: Path) -> None:
    """The points' numbers on the terminal, and where the report is."""
    shown = [_shown(row) for row in points.rows()]
    # One row per quantity, because a terminal is narrow.
    table = RichTable(*("", *(cells["point"] for cells in shown)))
    for name in list(shown[0])[1:]:
        table.add_row(name, *(cells[name] for cells in shown))
    console.print(table)
    say(console, f"report: {place}")


def read(folder: TaskStore, subject: Subject) -> tuple[dict[str, Table], dict[str, dict[str, str]]]:
    """Tables and methods of finished tasks, as `write` returns them."""
    methods = {name: folder.document(f"spectra/{name}", "methods") for name in subject.places}
    return _tables(folder, subject), methods


def _tables(folder: TaskStore, subject: Subject) -> dict[str, Table]:
    """Every number of the report."""

    def stacked(name: str) -> Table:
        return Table.concatenated(folder.table(f"spectra/{p}", name) for p in subject.places)

    tables = {name: stacked(name) for name in ("eigenvalues", "density")}
    if not subject.no_scores:
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


# -- findings -------------------------------------------------------------------------------


def _findings(tables: Mapping[str, Table]) -> list[report.Finding]:
    """The rows beside the figures."""
    rows = _spectrum_findings(tables["points"])
    if "path" in tables:
        rows = [*_path_findings(tables), *map(_drift, tables["displacement"].rows()), *rows]
    return rows


_INSIDE = (
    "value at the path's highest point over the mean of the ends; normal 95 % interval from the "
    "standard errors"
)


def _path_findings(tables: Mapping[str, Table]) -> list[report.Finding]:
    path = tables["path"].rows()[0]
    rows = []
    for panel, column, name in (
        ("A", "hessian_trace", "Hessian trace"),
        ("", "fisher_trace", "Fisher trace"),
    ):
        if column not in tables["points"]:
            continue
        ratio, low, high = _inside_over_ends(tables["points"], column)
        side = _side(low - 1, high - 1, "higher between", "lower between")
        texts = (f"{name}, between / ends", *_numbers(ratio, low, high))
        rows.append(report.Finding("along", panel, *texts, *side, [("Effect", _INSIDE)]))
    ends = max(path["loss_at_a"], path["loss_at_b"])
    barriers = [path[name] - ends for name in ("highest_loss", "highest_loss_of_line")]
    lower = barriers[0] < barriers[1]
    rows.append(
        report.Finding(
            "along",
            "C",
            "loss barrier of the path",
            f"{barriers[0]:.3g}",
            f"straight line {barriers[1]:.3g}",
            "lower than the straight line's" if lower else "not below the straight line's",
            "good" if lower else "bad",
            [("Effect", "highest loss, less that of the higher end")],
        )
    )
    return rows


def _drift(row: Mapping[str, Any]) -> report.Finding:
    notes = f"lr = {row['lr']:g}, B = {row['batch_size']}, {row['replicas']} replicas"
    if row["diverged"]:
        notes += f", {row['diverged']} diverged"
    return report.Finding(
        "relaxation",
        "A" if row["panel"] == f"k = {max(CYCLES.values())}" else "B",
        f"drift from s = {row['start']:g}, {row['panel']}",
        *_numbers(row["displacement"], row["low"], row["high"]),
        *_side(row["low"], row["high"], "toward B", "toward A"),
        [
            ("Effect", "mean displacement along the path; Student's 95 % interval"),
            ("Detail", notes),
        ],
    )


def _spectrum_findings(points: Table) -> list[report.Finding]:
    rows = []
    for row in points.rows():
        at = "" if row["point"] == "point" else f", {row['point']}"
        converged = bool(row.get("top_eigenvalue_converged", 1))
        top, mass = row["top_eigenvalue"], row["negative_mass"]
        error = row["negative_mass_std_error"]
        rows += [
            report.Finding(
                "spectra", "", f"largest eigenvalue{at}", f"{top:.4g}",
                f"± {row['top_eigenvalue_residual']:.2g}",
                "converged" if converged else NOT_CONVERGED, "good" if converged else "open",
                [("Effect", "the interval is the residual, within which lies an eigenvalue")],
            ),
            report.Finding(
                "spectra", "", f"negative mass{at}", f"{mass:.3g}",
                f"± {error:.2g}" if math.isfinite(error) else "",
                f"{mass / max(abs(row['hessian_trace']), 1e-300):.2g} of the trace", "muted",
                [("Effect", "sum of the sizes of the negative eigenvalues; ± is a standard error")],
            ),
        ]  # fmt: skip
    return rows


def _verdict(tables: Mapping[str, Table]) -> str:
    """The model's verdict in one line."""
    if "path" not in tables:
        row = tables["points"].rows()[0]
        return (
            f"Loss {row['loss']:.3g}; the Hessian has trace {row['hessian_trace']:.3g} and largest "
            f"eigenvalue {row['top_eigenvalue']:.3g}."
        )
    ratio, low, high = _inside_over_ends(tables["points"], "hessian_trace")
    where = f"{ratio:.3g} times that at the ends ({_figures(low, high)})"
    moved = tables["displacement"].rows()
    drifts = [_side(row["low"], row["high"], "B", "A")[0] for row in moved]
    return (
        f"Between A and B the Hessian trace is {where}; projected SGD drifts along the path from "
        f"{sum(drift in 'AB' for drift in drifts)} of {len(drifts)} settings."
    )


def _inside_over_ends(points: Table, column: str) -> tuple[float, float, float]:
    """A trace between the ends over its mean at the ends, with a normal 95 % interval."""
    value, error = (
        dict(zip(points["point"].tolist(), points[name].tolist(), strict=True))
        for name in (column, f"{column}_std_error")
    )
    ends = (value["A"] + value["B"]) / 2
    if not ends:
        return math.nan, math.nan, math.nan
    ratio = value["between"] / ends
    spread = math.hypot(error["between"], ratio * math.hypot(error["A"], error["B"]) / 2)
    return (ratio, *normal_interval(ratio, spread / abs(ends)))


def _side(low: float, high: float, above: str, below: str) -> tuple[str, str]:
    """The verdict on a number's sign from its interval, and its tone."""
    if low > 0:
        return above, "good"
    return (below, "good") if high < 0 else ("not resolved", "open")


def _numbers(value: float, low: float, high: float) -> tuple[str, str]:
    return (f"{value:.3g}" if math.isfinite(value) else "-", _figures(low, high))


def _figures(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) else ""


# -- words ----------------------------------------------------------------------------------


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A point's numbers as text: ± is a standard error, or an eigenvalue's residual."""

    def both(name: str, error: str) -> str:
        size = float(row[f"{name}_{error}"])
        # There is no standard error of one probe.
        return f"{row[name]:.4g} ± " + (f"{size:.2g}" if math.isfinite(size) else "unknown")

    cells = {"point": str(row["point"])}
    for name in ("s", "loss", "accuracy", "norm", "gradient_norm"):
        if name in row:
            cells[name.replace("_", " ")] = f"{row[name]:.4g}"
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
    if subject.no_scores:
        notes.append(f"No per-example gradients, so no Fisher matrix: {subject.no_scores}.")
    if subject.full.has_running_statistics:
        notes.append(
            "Normalization layers keep the statistics that the model came with."
            if subject.end is None
            else "Statistics of normalization layers are re-estimated at every point, the ends "
            "too: for curvature on its examples, for losses on all. The path and the relaxation "
            "use each batch's own, as in training."
        )
    for point, which in tables["eigenvalues"].where(all_converged=False).group_by("point", "which"):
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
    """Values for JSON, which has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
