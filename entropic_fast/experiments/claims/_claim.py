"""What a claim is, and how its verdict follows from an interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not enough data"
UNTESTED = "not tested at this scale"

# Where a claim, or a figure, is from.
PAPER = "paper, abstract and captions (arXiv 2512.06297)"
NOTES = "as reported in secondary notes"
OURS = "our choice"


@dataclass(frozen=True)
class Claim:
    """One claim, tested.

    Attributes:
        figure: the figure it is about.
        name: short and unique.
        statement: what must hold.
        measure: what `effect` is.
        effect, low, high: effect size and its 95 % interval (NaN where there is none).
        verdict: "holds", "does not hold", "not enough data", or "not tested at this scale".
        detail: the numbers that decide the verdict.
        source: where the claim is from: `PAPER`, `NOTES` or `OURS`.
        samples: how many independent samples there are, by what they are.
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
    source: str = PAPER
    samples: Mapping[str, int] = field(default_factory=dict)

    def at_scale(self, minimum: Mapping[str, int]) -> Claim:
        """The claim, untested if it has fewer samples than the minimum, by what they are."""
        few = {what: n for what, n in self.samples.items() if n < minimum.get(what, 0)}
        if not few:
            return self
        said = "; ".join(f"{n} {what}, {minimum[what]} are needed" for what, n in few.items())
        return replace(self, verdict=UNTESTED, detail=f"{said}; {self.detail}")


def verdict(low: float, high: float, null: float) -> str:
    """Holds if the whole interval is above `null`, fails if it is below; else undecided."""
    if low > null:
        return HOLDS
    return FAILS if high < null else UNDECIDED


def to_json(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Claims as JSON holds them; NaN becomes null."""
    return [
        {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        for row in map(asdict, claims)
    ]
