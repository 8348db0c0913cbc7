"""The table of compiled GPU kernels, from tests/support/kernel_budgets.json.

A page says where with the comment `<!-- kernels -->`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_benchmarks import table

RECORD = Path(__file__).parents[1] / "tests" / "support" / "kernel_budgets.json"
MARKER = "<!-- kernels -->"


def filled(markdown: str) -> str:
    """A page with the table in place of the comment."""
    return markdown.replace(MARKER, kernels()) if MARKER in markdown else markdown


def kernels() -> str:
    """Every kernel of every recorded call: one number for each architecture, or one for all."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    compilers = " and ".join(f"{name} {version}" for name, version in record["versions"].items())
    archs = ", ".join(next(_kernels(record))[2])
    head = ["call or file", "kernel", "registers", "spilled", "shared", "products", "loads"]
    rows = [
        [name, kernel, *(_of_all(archs, key) for key in KEYS)]
        for name, kernel, archs in _kernels(record)
    ]
    return f"For {archs}, by {compilers}; one entry where all are alike.\n\n" + table(head, rows)


KEYS = ("registers", "spilled bytes", "shared bytes", "products", "loads")


def _kernels(record: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, found in record["kernels"].items():
        for kernel, archs in found.items():
            yield name, kernel, archs


def _of_all(archs: dict[str, Any], key: str) -> str:
    """
    >>> _of_all({"sm_80": {"registers": 72}, "sm_90": {"registers": 80}}, "registers")
    '72 / 80'
    >>> _of_all({"sm_80": {"loads": [8, 16]}, "sm_90": {"loads": [8, 16]}}, "loads")
    '8, 16'
    """
    values = [_shown(numbers[key]) for numbers in archs.values()]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return f"{value:,}"
