"""What `entropic-fast check` does: right numbers, and how fast, on the machine at hand.

Start at `run` in `checking`. `samples` holds one small call of every op, `ops` compares it on each
backend with the float64 reference, `networks` compares whole calculations on two devices or by two
methods, `speeds` times them in units of plain gradients, and `page` shows it all. No numerics are
defined here.
"""

from ._checking import Report, run
from ._facts import collect
from ._page import print_report
from ._verdict import Check

__all__ = ["Check", "Report", "collect", "print_report", "run"]
