"""Drawing of figure 9."""

from __future__ import annotations

from matplotlib.figure import Figure

from ...._utils.table import Table
from .. import _style
from ..fig3 import curves


def draw(tables: dict[str, Table]) -> Figure:
    """A: traces, B: loss along the path from the normal to the bad minimum; C: relaxation."""
    curvature, loss = tables["fig9_curvature"], tables["fig9_loss"]
    figure, (trace, losses, tracks) = _style.panels(1, 3, width=3.7, height=3.3)
    for number, (column, label) in enumerate(
        (("hessian_trace", "Hessian trace"), ("fisher_trace", "Fisher trace"))
    ):
        trace.errorbar(
            curvature["s"],
            curvature[column],
            _style.BAND * curvature[f"{column}_std_error"],
            fmt="os"[number] + "-",
            color=_style.COLORS[number],
            capsize=2,
            label=label,
        )
    trace.set_yscale("log")
    trace.set_ylabel("trace")
    trace.legend()
    errors = {
        str(row["minimum"]): 100 * (1 - float(row["test_accuracy"]))  # type: ignore[arg-type]
        for row in tables["fig9_minima"].rows()
    }
    said = f"test error {errors['normal']:.1f} % to {errors['bad']:.1f} %"
    _style.letter(trace, "A", said)
    for kind, dash, label in (("path", "-", "minimum energy path"), ("line", ":", "straight line")):
        rows = loss.where(kind=kind)
        losses.plot(rows["s"], rows["loss"], dash, color="k", label=label)
    losses.set_yscale("log")
    losses.set_ylabel("cross-entropy [nats]")
    losses.legend()
    _style.letter(losses, "B", "loss (0: normal, 1: bad)")
    for ax in (trace, losses):
        ax.set_xlabel("relative distance along the path")
    table = tables["fig9_relaxation"]
    curves(
        tracks, table, tables["fig9_bands"], "start", lambda s: f"s = {s:g}", "step", displaced=True
    )
    _style.letter(
        tracks, "C", f"relaxation (B = {table['batch_size'][0]}, lr = {table['lr'][0]:g})"
    )
    return figure
