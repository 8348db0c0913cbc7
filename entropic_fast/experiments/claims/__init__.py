"""The paper's claims as tests on a run's CSV files: effect, interval, verdict.

Every claim is computed from `RUN/data/*.csv` alone, so that anyone can recompute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..._utils import checks
from ..._utils.table import Table
from ._claim import FAILS, HOLDS, UNDECIDED, Claim
from .connectivity import bad_minimum, lmc, straight_line
from .fig1 import ridge, ring
from .fig2 import curvature, path_loss, spectrum
from .force import force
from .relaxation import optimizers, relaxation

__all__ = ["Claim", "HOLDS", "FAILS", "UNDECIDED", "evaluate", "to_json"]

_TESTS: tuple[tuple[tuple[str, ...], Callable[..., list[Claim]]], ...] = (
    (("fig1_ring",), ring),
    (("fig1_ridge",), ridge),
    (("fig2_curvature",), curvature),
    (("fig2_loss",), path_loss),
    (("fig2_spectrum",), spectrum),
    (("fig3_relaxation", "fig2_curvature"), relaxation),
    (("fig4_optimizers",), optimizers),
    (("fig5_instability",), lmc),
    (("fig6_instability",), partial(lmc, figure="6")),
    (("fig7_instability",), partial(lmc, figure="7")),
    (("fig8_line", "fig8_relaxation"), straight_line),
    (("fig9_minima", "fig9_loss", "fig9_curvature", "fig9_relaxation"), bad_minimum),
    (("force_fit", "force_comparison"), force),
)


def evaluate(data: Path) -> list[Claim]:
    """Every claim whose tables are in the folder `data`, in the figures' order.

    Raises:
        ValueError: a table that is none, or not one that claims can be tested on.
    """
    claims: list[Claim] = []
    for names, test in _TESTS:
        files = [data / f"{name}.csv" for name in names]
        if not all(file.exists() for file in files):
            continue
        tables = [Table.from_csv(file) for file in files]
        try:
            claims += test(*tables)
        except Exception as error:
            raise checks.invalid(
                " and ".join(map(str, files)),
                "the columns and numbers of a finished run in each",
                f"others in one ({type(error).__name__}: {error})",
                "`entropic-fast report RUN` writes them again",
            ) from error
    return claims


def to_json(claims: list[Claim]) -> list[dict[str, Any]]:
    """Claims as JSON holds them; NaN becomes null."""
    return [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        for row in map(asdict, claims)
    ]
