"""Which cases of a test each tier runs."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DURATIONS = Path(__file__).parents[1] / "durations.txt"


class Tier(NamedTuple):
    """Limits for the cases of one test."""

    cases: int  # at most
    budget: float  # seconds of all of them together; one is run in any case
    most: float  # seconds of a case


DEFAULT, FULL = Tier(8, 0.8, 2.0), Tier(16, 1.5, 8.0)
LEAST = 0.1  # seconds of a case from which on its test is listed


def test_of(node: str) -> str:
    """The test of a case."""
    return node.partition("[")[0]


def read_durations() -> dict[str, tuple[float, bool]]:
    """Seconds per case, and whether a case is run however long it takes, by test."""
    found = {}
    lines = DURATIONS.read_text().splitlines() if DURATIONS.exists() else []
    for line in lines:
        if not line.startswith("#"):
            test, seconds, *keep = line.split(" ")
            found[test] = (float(seconds), bool(keep))
    return found


def left_out(nodes: Iterable[str], tier: Tier) -> set[str]:
    """The cases that a tier leaves out, chosen by a hash of their names."""
    durations = read_durations()
    cases = defaultdict(list)
    for node in nodes:
        cases[test_of(node)].append(node)
    found: set[str] = set()
    for test, names in cases.items():
        seconds, keep = durations.get(test, (0.0, False))
        count = tier.cases
        if seconds > 0:
            count = min(count, max(1, int(tier.budget / seconds)))
        if seconds > tier.most:
            count = int(keep)
        found.update(sorted(names, key=lambda name: zlib.crc32(name.encode()))[count:])
    return found
