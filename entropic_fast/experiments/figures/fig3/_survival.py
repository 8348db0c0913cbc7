"""Relaxation of figure 3 as survival analysis: Kaplan-Meier, log-rank tests, scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ...._utils.table import Table
from ....dynamics import RelaxationTime, fit_scaling, kaplan_meier, log_rank, relaxation_time
from .._relaxation_runs import trajectory_of

REMAINING = 0.8  # of the distance from the nearest end: few replicas of a short run come nearer


def survival(table: Table) -> tuple[Table, Table]:
    """Relaxation times of figure 3's panels B, C and D, in updates.

    Args:
        table: the trajectories, "fig3_relaxation".

    Returns:
        a row a setting: Kaplan-Meier's median with its interval, and the paired log-rank test
        against the panel's first setting (p; NaN for the first itself); and the scaling of the
        rate with learning rate, batch size and k, one row an exponent, where they vary and
        enough replicas arrived (else no rows). Replicas with one number share their noise.
    """
    found: list[tuple[str, Setting, _Times]] = []
    for panel in ("B", "C", "D"):
        part = table.where(panel=panel)
        settings = set(zip(*(part[name].tolist() for name in SETTING), strict=True))
        for setting in sorted(settings):
            rows = part.where(**dict(zip(SETTING, setting, strict=True)))
            found.append((panel, setting, _times(rows)))
    rows_of: list[dict[str, object]] = []
    for panel, group in groupby(found, key=lambda entry: entry[0]):
        same_panel = list(group)
        first = same_panel[0][2]
        for i, (_, setting, times) in enumerate(same_panel):
            km = kaplan_meier(times.found)
            rows_of.append(
                {
                    "panel": panel,
                    **dict(zip(SETTING, setting, strict=True)),
                    "median_updates": km.median,
                    "low": km.low,
                    "high": km.high,
                    "arrived": km.arrived,
                    "replicas": km.replicas,
                    "log_rank_p": log_rank(first.found, times.found, paired=True)[1]
                    if i
                    else math.nan,
                }
            )
    return Table.from_rows(rows_of), _scaling(found)


Setting = tuple[float, int, int]
SETTING = ("lr", "batch_size", "project_every")


@dataclass(frozen=True)
class _Times:
    """Relaxation times of one setting, and the numbers of its replicas."""

    found: RelaxationTime
    replicas: list[int]


def _scaling(found: list[tuple[str, Setting, _Times]]) -> Table:
    # A setting that several panels hold counts once.
    groups = {setting: times for _, setting, times in found}
    columns = ("setting", "exponent", "std_error", "low", "high", "arrived", "replicas", "note")
    varying = [i for i in range(len(SETTING)) if len({setting[i] for setting in groups}) > 1]
    try:
        fit = fit_scaling(
            [
                ({SETTING[i]: float(setting[i]) for i in varying}, times.found)
                for setting, times in groups.items()
            ],
            replicas=[times.replicas for times in groups.values()],
        )
    except ValueError:
        return Table({name: [] for name in columns})  # too few arrived, or one setting only
    note = "" if fit.identifiable else str(fit)
    values = zip(fit.names, fit.exponents, fit.std_errors, fit.low, fit.high, strict=True)
    return Table.from_rows(
        [dict(zip(columns, (*v, fit.arrived, fit.replicas, note), strict=True)) for v in values]
    )


def _times(rows: Table) -> _Times:
    """First passages to a share of the distance from the nearest end, in updates."""
    replicas = sorted(
        (rows.where(run=r) for r in np.unique(rows["run"])), key=lambda r: int(r["replica"][0])
    )
    position = torch.tensor(
        np.stack([np.asarray(r["position"], dtype=float) for r in replicas]), dtype=torch.float64
    )
    trajectory = trajectory_of(
        position,
        torch.as_tensor(replicas[0]["step"]),
        torch.ones(len(replicas), dtype=torch.float64),  # so that times are updates
        str(rows["optimizer"][0]),
        int(rows["batch_size"][0]),
        int(rows["project_every"][0]),
    )
    start = float(rows["start"][0])
    target = 0.0 if start <= 0.5 else 1.0
    times = relaxation_time(trajectory, fraction=REMAINING, target=target)
    return _Times(times, [int(r["replica"][0]) for r in replicas])
