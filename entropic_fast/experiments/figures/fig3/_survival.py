"""Relaxation of figure 3 as survival analysis: Kaplan-Meier, log-rank tests, scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...._utils.table import Table
from ....dynamics import RelaxationTime, fit_scaling, kaplan_meier, log_rank, relaxation_time
from .._relaxation_runs import nearest_end, trajectory_of

REMAINING = 0.8  # of the distance from the nearest end: few replicas of a short run come nearer


def survival(table: Table) -> tuple[Table, Table]:
    """Relaxation times of figure 3's panels B, C and D, in updates.

    Args:
        table: the trajectories, "fig3_relaxation".

    Returns:
        a table with one row per setting: Kaplan-Meier's median with its interval, and the paired
        log-rank test against the panel's first setting (p; NaN for the first itself); and a table
        of the exponents with which the rate scales in learning rate, batch size and k, those that
        vary, without rows if too few replicas arrived. Replicas with one number share their noise.
    """
    times: dict[Setting, _Times] = {}  # a setting that several panels have counts once
    rows: list[dict[str, object]] = []
    for panel in ("B", "C", "D"):
        first = None
        for setting, group in sorted(table.where(panel=panel).group_by(*SETTING).items()):
            here = times[setting] = _times(group)
            km = kaplan_meier(here.found)
            rows.append(
                {
                    "panel": panel,
                    **dict(zip(SETTING, setting, strict=True)),
                    "median_updates": km.median,
                    "low": km.low,
                    "high": km.high,
                    "arrived": km.arrived,
                    "replicas": km.replicas,
                    "log_rank_p": log_rank(first.found, here.found, paired=True)[1]
                    if first
                    else math.nan,
                }
            )
            first = first or here
    return Table.from_rows(rows), _scaling(times)


Setting = tuple[float, int, int]
SETTING = ("lr", "batch_size", "project_every")


@dataclass(frozen=True)
class _Times:
    """Relaxation times of one setting, and the numbers of its replicas."""

    found: RelaxationTime
    replicas: list[int]


def _scaling(groups: dict[Setting, _Times]) -> Table:
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
    replicas = sorted(rows.group_by("run").values(), key=lambda r: int(r["replica"][0]))
    # At a learning rate of 1 times are updates.
    times = relaxation_time(
        trajectory_of(replicas, 1.0), fraction=REMAINING, target=nearest_end(rows.rows()[0])
    )
    return _Times(times, [int(r["replica"][0]) for r in replicas])
