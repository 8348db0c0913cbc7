"""Figure 2: curvature, loss and spectrum along minimum energy paths between minima."""

from ....curvature.estimators import EXTRA_COLUMNS
from ..._figure import PAPER, ClaimTest, Expected, Figure
from ._claims import curvature, path_loss, spectrum
from ._draw import Styles, draw, draw_curvature, draw_losses, draw_ranked
from ._tasks import Curvature, both_losses, collect, profile, tasks

__all__ = [
    "FIGURE",
    "Curvature",
    "Styles",
    "both_losses",
    "draw_curvature",
    "draw_losses",
    "draw_ranked",
    "profile",
]

FIGURE = Figure(
    name="fig2",
    command="curvature",
    help="Measure curvature along the paths (figure 2).",
    section=Curvature,
    needs=("train", "path"),
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(
        ClaimTest(("fig2_curvature",), curvature),
        ClaimTest(("fig2_loss",), path_loss),
        ClaimTest(("fig2_spectrum",), spectrum),
    ),
    tiny={"probes": 2, "tol": 0.2, "spectrum_examples": 32},
    title="Figure 2. Entropy induces barriers between minima.",
    caption="Hessian trace (A), its largest eigenvalue (B) and the loss (C) along minimum energy "
    "paths; colors are pairs of minima, marker shapes are AutoNEB seeds, each marker is a pivot. "
    "D: spectrum of the score matrix along the first path. Normalization statistics, where a "
    "network keeps them, are re-estimated at every point.",
    source=PAPER,
    expected={
        "curvature": Expected((0.27, 0.54), lambda config: EXTRA_COLUMNS + 2),
        # A Gram matrix, its copy, and the eigensolver's workspace.
        "spectrum": Expected(
            (0.63, 0.23),
            lambda config: 2,
            lambda config: 3 * 8 * config[Curvature].spectrum_examples ** 2,
        ),
    },
)
