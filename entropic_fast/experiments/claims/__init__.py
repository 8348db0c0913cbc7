"""What a claim is, and how its verdict follows from an interval.

Every claim is computed from `RUN/data/*.csv` alone, so that anyone can recompute it. The claims of
a figure are in its module.
"""

from ._claim import FAILS, HOLDS, NOTES, OURS, PAPER, UNDECIDED, UNTESTED, Claim, to_json, verdict

__all__ = [
    "FAILS",
    "HOLDS",
    "NOTES",
    "OURS",
    "PAPER",
    "UNDECIDED",
    "UNTESTED",
    "Claim",
    "to_json",
    "verdict",
]
