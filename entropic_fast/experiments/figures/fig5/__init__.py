"""Figure 5: entropic barriers appear later in training (linear mode connectivity)."""

from functools import partial

from ..._figure import PAPER, ClaimTest, Expected, Figure
from ._claims import lmc
from ._draw import draw
from ._tasks import LMC, collect, straight_line_epoch, tasks

__all__ = ["FIGURE", "LMC", "straight_line_epoch", "variant"]

FIGURE = Figure(
    name="fig5",
    command="lmc",
    help="Branch training and measure linear mode connectivity (figures 5 to 7).",
    section=LMC,
    tasks=tasks,
    collect=collect,
    draw=draw,
    claims=(ClaimTest(("fig5_instability",), lmc),),
    tiny={"epochs": 3, "branch_epochs": [0, 1], "seeds": [0, 1], "points": 3},
    minimum={"trunks": 3},
    title="Figure 5. Entropic barriers matter later in training.",
    caption="Two branches from epoch k with different data orders, joined by a straight line. "
    "Instability: (maximum on the line - mean of the ends) / mean of the ends. Points are trunks; "
    "bands, from three trunks on, are 95 % intervals of the mean (Student's t).",
    source=PAPER,
    expected={"lmc": Expected((0.55, 0.74))},
)


def variant(section: type[LMC], **fields: object) -> Figure:
    """Figure 5 for the network and images of another section, which also names the figure."""
    name = section.toml
    values: dict[str, object] = {
        "name": name,
        "command": "lmc",
        "section": section,
        "tasks": partial(tasks, section=section),
        "collect": partial(collect, section=section, name=name),
        "draw": partial(draw, name=name),
        "claims": (ClaimTest((f"{name}_instability",), partial(lmc, figure=name[3:])),),
        "minimum": FIGURE.minimum,
        "caption": lambda config: (
            f"As figure 5, for {config[section].model} on "
            f"{config[section].data or config.data.name}."
        ),
        "enabled": lambda config: bool(config[section].seeds),
        **fields,
    }
    return Figure(**values)  # type: ignore[arg-type]
