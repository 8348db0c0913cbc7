"""Figure 7 (ours): figure 5 for a third network."""

from .._figure import OURS, Expected
from .._sections import DistinctOrNone, Natural
from .fig5 import LMC, variant


class Fig7(LMC):
    """Linear mode connectivity of a third network; without seeds there is no such figure."""

    toml = "fig7"
    seeds: DistinctOrNone[Natural] = ()


FIGURE = variant(
    Fig7,
    title="Figure 7 (ours). Figure 5 for a third network.",
    source=OURS,
    # The network of the demo crashes torch 2.14.1 on some CPUs: its convolutions have 4 channels.
    tiny={"model": "resnet8-w8", "epochs": 1, "seeds": [0], "branch_epochs": [0], "points": 3},
    expected={"fig7": Expected((0.7, 1.18))},
)
