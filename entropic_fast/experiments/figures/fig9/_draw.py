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
    for marker, color, column, label in (
        ("o-", _style.COLORS[0], "hessian_trace", "Hessian trace"),
        ("s-", _style.COLORS[1], "fisher_trace", "Fisher trace"),
    ):
        error = _style.BAND * curvature[f"{column}_std_error"]
        _style.errorbars(trace, curvature["s"], curvature[column], error, color, label, marker)
    trace.set(yscale="log", ylabel="trace")
    trace.legend()
    errors = {
        row["minimum"]: 100 * (1 - row["test_accuracy"]) for row in tables["fig9_minima"].rows()
    }
    title = f"test error {errors['normal']:.1f} % to {errors['bad']:.1f} %"
    _style.letter(trace, "A", title)
    for kind, dash, label in (("path", "-", "minimum energy path"), ("line", ":", "straight line")):
        rows = loss.where(kind=kind)
        losses.plot(rows["s"], rows["loss"], dash, color="k", label=label)
    losses.set(yscale="log", ylabel="cross-entropy [nats]")
    losses.legend()
    _style.letter(losses, "B", "loss (0: normal, 1: bad)")
    for ax in (trace, losses):
        ax.set_xlabel("relative distance along the path")
    table, bands = tables["fig9_relaxation"], tables["fig9_bands"]
    curves(tracks, table, bands, "start", lambda s: f"s = {s:g}", "step", displaced=True)
    title = f"relaxation (B = {table['batch_size'][0]}, lr = {table['lr'][0]:g})"
    _style.letter(tracks, "C", title)
    return figure
