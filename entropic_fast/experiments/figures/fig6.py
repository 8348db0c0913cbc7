"""Figure 6 (ours): figure 5 for another network."""

from .._figure import OURS, Expected
from .._sections import DistinctOrNone, Natural
from .fig5 import LMC, variant


class Fig6(LMC):
    """Linear mode connectivity of another network; without seeds there is no such figure."""

    toml = "fig6"
    seeds: DistinctOrNone[Natural] = ()


FIGURE = variant(
    Fig6,
    title="Figure 6 (ours). Figure 5 for another network.",
    source=OURS,
    tiny={"epochs": 2, "seeds": [0], "branch_epochs": [0, 1], "points": 3},
    expected={"fig6": Expected((0.58, 0.75))},
)
