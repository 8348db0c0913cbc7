"""Relaxation runs behind figures 3 and 4: which, at what settings, as one long table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

from ..dynamics import Trajectory, relax
from ..table import Table
from . import pieces
from .run import RunFolder
from .schedule import Report, Unit

SCAN = "relax/C"  # the learning-rate scan, from which the rule chooses


def units(run: RunFolder) -> list[Unit]:
    """The scan over learning rates first; starts, batch sizes and optimizers at the rate chosen.

    Panel B's and figure 4's shared setting (the base batch size, vanilla SGD) is run once.
    """
    section = run.config.relax
    path = f"path/{pieces.path_names(run)[0][0]}"
    per = section.steps * section.batch_size / 40_000  # expected seconds a replica
    many = section.replicas
    found = [Unit(SCAN, scan_rates, (), (path,), per * many * len(section.lrs))]
    after = (path, SCAN)
    starts = len(section.starts) or run.config.path.pivots - 1
    found.append(Unit("relax/A", relax_starts, (), after, per * many * starts))
    for size in section.batch_sizes:
        weight = per * many * size / section.batch_size
        found.append(Unit(f"relax/B-{size}", relax_batch, (size,), after, weight))
    for name in section.optimizers:
        found.append(Unit(f"relax/{name}", relax_optimizer, (name,), after, per * many))
    return found


def scan_rates(run: RunFolder, report: Report) -> dict[str, Any]:
    """Panel C: every learning rate at the base batch size; and the rate the rule chooses."""
    section = run.config.relax
    table = _relax(run, report, "C", [_start(run)], section.lrs, section.batch_size, "sgd")
    return {"trajectory": table, "choice": _choose(table, section.lr)}


def relax_starts(run: RunFolder, report: Report) -> dict[str, Any]:
    """Panel A: several starting points."""
    section = run.config.relax
    starts = section.starts or tuple(_midpoints(run))
    return {
        "trajectory": _relax(
            run, report, "A", starts, [chosen_rate(run)], section.batch_size, "sgd"
        )
    }


def relax_batch(run: RunFolder, report: Report, size: int) -> dict[str, Any]:
    """Panel B: one batch size."""
    return {
        "trajectory": _relax(run, report, "B", [_start(run)], [chosen_rate(run)], size, "sgd")
    }


def relax_optimizer(run: RunFolder, report: Report, name: str) -> dict[str, Any]:
    """Figure 4: one optimizer at the base batch size; Adam at its own multiple of the rate."""
    section = run.config.relax
    factor = section.adam_lr_factor if name == "adam" else 1.0
    rates = [optimizer_rate(run) * factor]
    return {
        "trajectory": _relax(run, report, "4", [_start(run)], rates, section.batch_size, name)
    }


def chosen_rate(run: RunFolder) -> float:
    """The learning rate of panels A and B."""
    return float(run.document(SCAN, "choice")["lr"])


def optimizer_rate(run: RunFolder) -> float:
    """The learning rate of figure 4."""
    return run.config.relax.optimizer_lr or chosen_rate(run)


def choice_text(run: RunFolder) -> str:
    """How that rate was chosen, for captions."""
    return str(run.document(SCAN, "choice")["why"])


def collect(run: RunFolder, names: Sequence[str]) -> Table:
    """Trajectories of several units as one table; `run` numbers the replicas."""
    rows: list[dict[str, object]] = []
    offset = 0
    for name in names:
        table = run.table(f"relax/{name}", "trajectory")
        rows += [{**row, "run": offset + int(row["run"])} for row in table.rows()]  # type: ignore[call-overload]
        offset += int(table["run"].max()) + 1
    return Table.from_rows(rows)


def _relax(run: RunFolder, report: Report, panel: str, starts: Sequence[float],
           rates: Sequence[float], batch_size: int, optimizer: str) -> Table:
    section = run.config.relax
    name, first, *_ = pieces.path_names(run)[0]
    settings = [(s, lr) for s, lr in product(starts, rates) for _ in range(section.replicas)]
    every = section.project_every
    trajectory = relax(
        pieces.objective(run, pieces.minimum(run, first)),
        pieces.load_path(run, name),
        [s for s, _ in settings],
        optimizer,
        lr=[lr for _, lr in settings],
        batch_size=batch_size,
        project_every=every,
        steps=section.steps,
        seed=run.config.seed,
        # The same noise at every setting: differences between settings are not the noise's.
        ids=[i % section.replicas for i in range(len(settings))],
        record_every=max(1, section.steps // (section.records * every)) * every,
        on_record=lambda record: report(record.step / section.steps),
    )
    return _long(trajectory, panel, settings)


def _long(trajectory: Trajectory, panel: str, settings: Sequence[tuple[float, float]]) -> Table:
    count = len(trajectory.steps)
    columns: dict[str, list[Any]] = {
        key: []
        for key in ("panel", "run", "optimizer", "start", "lr", "batch_size", "step",
                    "effective_time", "position", "distance", "loss")
    }
    steps = trajectory.steps.tolist()
    for i, (start, lr) in enumerate(settings):
        columns["panel"] += [panel] * count
        columns["run"] += [i] * count
        columns["optimizer"] += [trajectory.optimizer] * count
        columns["start"] += [start] * count
        columns["lr"] += [lr] * count
        columns["batch_size"] += [trajectory.batch_size] * count
        columns["step"] += steps
        columns["effective_time"] += [lr * step for step in steps]
        columns["position"] += trajectory.position[i].tolist()
        columns["distance"] += trajectory.distance[i].tolist()
        columns["loss"] += trajectory.loss[i].tolist()
    return Table(columns)


def _choose(table: Table, fixed: float) -> dict[str, Any]:
    """The learning rate asked for; if 0, the lowest that moves beyond its interval."""
    if fixed:
        return {"lr": fixed, "why": f"learning rate {fixed:g} as configured"}
    rates = sorted(set(table["lr"].tolist()))
    last = table["step"].max()
    for lr in rates:
        rows = table.where(lr=lr)
        moved = np.asarray(rows["position"] - rows["start"], dtype=float)[rows["step"] == last]
        moved = moved[np.isfinite(moved)]
        if len(moved) < 2:
            continue
        half = stats.t.ppf(0.975, len(moved) - 1) * moved.std(ddof=1) / np.sqrt(len(moved))
        if abs(np.median(moved)) > max(half, MINIMUM_DISPLACEMENT):
            return {
                "lr": lr,
                "why": f"learning rate {lr:g}: the lowest of {_list(rates)} at which the median "
                f"displacement ({np.median(moved):+.4f}) exceeds its 95 % interval "
                f"(± {half:.4f}) and {MINIMUM_DISPLACEMENT:g}",
            }
    return {
        "lr": rates[-1],
        "why": f"learning rate {rates[-1]:g}: at none of {_list(rates)} did the median "
        "displacement exceed its 95 % interval; the largest is used",
    }


MINIMUM_DISPLACEMENT = 0.01  # of the path: below it nothing can be seen in a figure


def _list(rates: Sequence[float]) -> str:
    return ", ".join(f"{r:g}" for r in rates)


def _start(run: RunFolder) -> float:
    return run.config.relax.start or _midpoints(run)[1]  # between the second and third pivots


def _midpoints(run: RunFolder) -> list[float]:
    positions = pieces.load_path(run, pieces.path_names(run)[0][0]).positions.tolist()
    return [(a + b) / 2 for a, b in zip(positions, positions[1:], strict=False)]
