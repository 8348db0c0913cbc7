"""Figure 9 (ours): a minimum that generalizes badly, and the path to it from a normal one.

The bad minimum fits the images that the path's loss is of, and other images with wrong labels (as
in Wu, Zhu, E 2017, arXiv 1706.10239), so that it errs elsewhere.
"""

from ..._figure import OURS, ClaimTest, Expected, Figure
from ._claims import bad_minimum
from ._draw import draw
from ._tasks import BadMinimum, collect, tasks

FIGURE = Figure(
    name="fig9",
    command="bad-minimum",
    help="Train a minimum that generalizes badly, and relax on the path to it (figure 9).",
    section=BadMinimum,
    needs=("train",),
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(
        ClaimTest(("fig9_minima", "fig9_loss", "fig9_curvature", "fig9_relaxation"), bad_minimum),
    ),
    tiny={"corrupted_labels": 40, "epochs": 3, "steps": 30, "replicas": 2},
    minimum={"replicas": 3},
    title="Figure 9 (ours). A minimum that generalizes badly.",
    caption="Path from the first minimum (0) to one that fits the same images and wrong labels on "
    "others (1). Loss, curvature and dynamics are those on the images with right labels.",
    source=OURS,
    enabled=lambda config: config[BadMinimum].corrupted_labels > 0,
    expected={
        "bad-minimum": Expected(
            (0.47, 0.93), lambda c: max(6 * c.path.max_pivots, 4 * c[BadMinimum].replicas)
        )
    },
)
