"""Relaxation of figure 3 as survival analysis: Kaplan-Meier, log-rank tests, scaling."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import torch

from ..dynamics import RelaxationTime, fit_scaling, kaplan_meier, log_rank, relaxation_time
from ..table import Table
from .relaxation import trajectory_of

REMAINING = 0.8  # of the distance from the nearest end: few replicas of a short run come nearer


def survival(table: Table, project_every: int) -> tuple[Table, Table]:
    """Relaxation times of figure 3's panels B and C, in updates.

    Args:
        table: the trajectories, "fig3_relaxation".
        project_every: k of the run.

    Returns:
        a row a setting: Kaplan-Meier's median with its interval, and the log-rank test against
        the panel's first setting (p; NaN for the first itself); and the scaling of the rate with
        learning rate and batch size, one row an exponent, where enough replicas arrived (else no
        rows).
    """
    found = []
    for panel in ("B", "C"):
        part = table.where(panel=panel)
        for lr, size in sorted(
            set(zip(part["lr"].tolist(), part["batch_size"].tolist(), strict=True))
        ):
            setting = part.where(lr=lr, batch_size=size)
            found.append((panel, lr, int(size), _times(setting, lr, int(size))))
    rows: list[dict[str, object]] = []
    for panel, group in groupby(found, key=lambda entry: entry[0]):
        settings = list(group)
        for i, (_, lr, size, times) in enumerate(settings):
            km = kaplan_meier(times)
            rows.append(
                {
                    "panel": panel,
                    "lr": lr,
                    "batch_size": size,
                    "project_every": project_every,
                    "median_updates": km.median,
                    "low": km.low,
                    "high": km.high,
                    "arrived": km.arrived,
                    "replicas": km.replicas,
                    "log_rank_p": log_rank(settings[0][3], times)[1] if i else math.nan,
                }
            )
    return Table.from_rows(rows), _scaling(found)


def _scaling(found: list[tuple[str, float, int, RelaxationTime]]) -> Table:
    # A setting that both panels hold counts once.
    groups = {(lr, size): times for _, lr, size, times in found}
    columns = ("setting", "exponent", "std_error", "low", "high", "arrived", "replicas")
    try:
        fit = fit_scaling(
            [({"lr": lr, "batch_size": float(b)}, times) for (lr, b), times in groups.items()]
        )
    except ValueError:
        return Table({name: [] for name in columns})  # too few arrived, or one setting only
    values = zip(fit.names, fit.exponents, fit.std_errors, fit.low, fit.high, strict=True)
    return Table.from_rows(
        [dict(zip(columns, (*v, fit.arrived, fit.replicas), strict=True)) for v in values]
    )


def _times(rows: Table, lr: float, batch_size: int) -> RelaxationTime:
    """First passages to a share of the distance from the nearest end, in updates."""
    replicas = [rows.where(run=r) for r in np.unique(rows["run"])]
    position = torch.tensor(
        np.stack([np.asarray(r["position"], dtype=float) for r in replicas]), dtype=torch.float64
    )
    trajectory = trajectory_of(
        position,
        torch.as_tensor(replicas[0]["step"]),
        torch.ones(len(replicas), dtype=torch.float64),  # so that times are updates
        str(rows["optimizer"][0]),
        batch_size,
    )
    start = float(rows["start"][0])
    return relaxation_time(trajectory, fraction=REMAINING, target=0.0 if start <= 0.5 else 1.0)
