"""The force: drift measured along the first path against the prediction from its curvature."""

from ..._figure import OURS, ClaimTest, Expected, Figure
from ._claims import force
from ._draw import draw
from ._tasks import (
    Force,
    collect,
    dynamics_objective,
    fits,
    places,
    residuals,
    shares,
    short_run_settings,
    tasks,
)

__all__ = [
    "FIGURE",
    "Force",
    "dynamics_objective",
    "fits",
    "places",
    "residuals",
    "shares",
    "short_run_settings",
]

FIGURE = Figure(
    name="force",
    command="force",
    help="Measure the force along the first path against its prediction.",
    section=Force,
    needs=("train", "path"),
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("force_fit", "force_comparison"), force),),
    tiny={"positions": 3, "replicas": 4, "cycles": [1, 4], "directions": 2, "rest_examples": 2},
    minimum={"positions": 4},  # of three, no permutation is rarer than 1/6
    title="The force, measured.",
    caption="Short runs of projected SGD from positions along the first path, at a temperature low "
    "enough for theory. A: drift velocity, minus that of the same run without noise and minus the "
    "effect of drawing an epoch's minibatches without replacement, against the entropic velocity "
    "predicted from curvature across the path and gradient noise. Bars are 95 % over replicas, and "
    "over the samples of the prediction, which the line and its band treat as exact. B: velocities "
    "along the path, with the uncertainty of a mean over one order of batches. C: slopes on that "
    "prediction, of the drift at every k (below the largest with a third of the updates and a "
    "quarter of the replicas), and of what a run without noise does beyond the gradient. D: shares "
    "of the measured drift explained by its components and by the controls, with 95 % percentile "
    "intervals.",
    source=OURS,
    expected={"force": Expected((1.0, 0.9), lambda config: 4 * config[Force].replicas)},
)
