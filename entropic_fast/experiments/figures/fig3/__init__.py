"""Figure 3: relaxation along the first path, by starting point, batch size, learning rate, k."""

from ..._figure import PAPER, ClaimTest, Expected, Figure
from .._relaxation_runs import Relax
from ._claims import faster, relaxation, replicas_of
from ._draw import curves, draw
from ._tasks import collect, notes, optimizer_rate, tasks

__all__ = ["FIGURE", "curves", "faster", "optimizer_rate", "replicas_of"]

FIGURE = Figure(
    name="fig3",
    command="relax",
    help="Relax along the first path (figures 3 and 4).",
    section=Relax,
    needs=("train", "path"),
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("fig3_relaxation", "fig2_curvature"), relaxation),),
    tiny={"steps": 30, "replicas": 2, "records": 2},
    # An interval over replicas needs three; fewer than six starts cannot exclude a share of 1/2.
    minimum={"replicas": 3, "starts": 6},
    title="Figure 3. Relaxation by entropic forces.",
    caption="Projected SGD on the first path. Thin lines are replicas, thick lines their means, "
    "bands 95 % intervals of the mean (Student's t). Replicas see the same minibatches at every "
    "setting. D (ours): by the number k of updates between projections.",
    source=PAPER,
    notes=notes,
    expected={
        "relax": Expected(
            (0.44, 0.88), lambda c: 4 * c[Relax].replicas * max(len(c[Relax].lrs), c.path.pivots)
        )
    },
)
