"""Figure 1: model potentials in which curvature alone produces a force (ring and ridge)."""

from ..._figure import PAPER, ClaimTest, Expected, Figure
from ._claims import ridge, ring
from ._draw import draw
from ._tasks import Langevin, collect, tasks

FIGURE = Figure(
    name="fig1",
    command="langevin",
    help="Simulate Langevin particles in the ring and ridge potentials (figure 1).",
    section=Langevin,
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("fig1_ring",), ring), ClaimTest(("fig1_ridge",), ridge)),
    tiny={"particles": 500, "steps": 200},
    title="Figure 1. Curvature produces an entropic force.",
    caption="A: particles in a ring potential whose stiffness varies with the angle: uniform "
    "without noise, concentrated at the flat side of the ring with noise. B: one particle on a "
    "ridge (the one that ends nearest to the mean), and the mean of all particles, which drifts "
    "to the broad side. Effective potential (T/2) ln det H across the slow direction.",
    source=PAPER,
    expected={"langevin": Expected((0.0, 0.0), lambda config: 0, seconds=2e-5)},
)
