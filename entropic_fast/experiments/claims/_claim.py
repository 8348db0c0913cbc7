"""What a claim is, and how its verdict follows from an interval."""

from __future__ import annotations

from dataclasses import dataclass

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not enough data"


@dataclass(frozen=True)
class Claim:
    """One claim, tested.

    Attributes:
        figure: the figure it is about.
        name: short and unique.
        statement: what must hold, and where that is from ([S] seed document, [N] reading
            notes, [D] our decision).
        measure: what `effect` is.
        effect, low, high: effect size and its 95 % interval (NaN where there is none).
        verdict: "holds", "does not hold" or "not enough data".
        detail: what the verdict rests on.
    """

    figure: str
    name: str
    statement: str
    measure: str
    effect: float
    low: float
    high: float
    verdict: str
    detail: str


def verdict(low: float, high: float, null: float) -> str:
    """Holds if the whole interval is above `null`, fails if it is below; else undecided."""
    if low > null:
        return HOLDS
    return FAILS if high < null else UNDECIDED
