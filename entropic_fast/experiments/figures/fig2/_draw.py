"""Drawing of figure 2."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...._utils.table import Table
from .. import _style

DISTANCE = "relative distance along the path"
Styles = dict[str, tuple[str, str, str]]  # path -> color, marker, legend


def draw(tables: dict[str, Table]) -> Figure:
    """Panels A to D of the paper's figure 2."""
    figure, (trace, eigenvalue, loss, spectrum) = _style.panels(2, 2, width=4.4, height=3.1)
    styles = _styles(tables["fig2_paths"])
    draw_curvature(trace, eigenvalue, tables["fig2_curvature"], styles)
    trace.legend(title="minima, AutoNEB seed", title_fontsize=7.5, ncols=2)
    draw_losses(loss, tables["fig2_loss"], styles)
    draw_spectrum(spectrum, tables["fig2_spectrum"])
    _style.letter(spectrum, "D", f"spectrum along path {tables['fig2_spectrum']['path'][0]}")
    return figure


def draw_curvature(trace: Axes, eigenvalue: Axes, curvature: Table, styles: Styles) -> None:
    """Panels A and B: trace of the Hessian and its largest eigenvalue, by path."""
    for ax, column, error, label in (
        (trace, "hessian_trace", "hessian_trace_std_error", "Hessian trace"),
        (eigenvalue, "top_eigenvalue", "top_eigenvalue_residual", "largest Hessian eigenvalue"),
    ):
        for name, (color, marker, text) in styles.items():
            rows = curvature.where(path=name)
            bars = _style.BAND * rows[error]
            _style.errorbars(ax, rows["s"], rows[column], bars, color, text, f"{marker}-")
        if column == "top_eigenvalue":
            _style.mark_unconverged(ax, curvature, "s", column, "top_eigenvalue_converged")
        ax.set(xlabel=DISTANCE, ylabel=label)
        if curvature[column].min() >= 0:
            ax.set_ylim(bottom=0)
    _style.letter(trace, "A", "trace of the Hessian (± 95 %)")
    _style.letter(eigenvalue, "B", "largest eigenvalue (± residual bound)")


def draw_losses(
    ax: Axes, table: Table, styles: Styles, label: str = "cross-entropy [nats]"
) -> None:
    """Panel C: the loss along the paths and the straight lines."""
    for name, (color, _, _) in styles.items():
        for kind, dash in (("path", "-"), ("line", ":")):
            rows = table.where(path=name, kind=kind)
            ax.plot(rows["s"], rows["loss"], dash, color=color)
    ax.plot([], [], "k-", label="minimum energy path")
    ax.plot([], [], "k:", label="straight line")
    ax.set(yscale="log", xlabel=DISTANCE, ylabel=label)
    ax.legend()
    _style.letter(ax, "C", "loss along the paths")


def draw_spectrum(ax: Axes, table: Table) -> None:
    """Panel D: eigenvalues of the score matrix by rank, one curve per position."""
    groups = sorted(table.group_by("s").items())
    curves = {f"s = {s:.2f}": rows for s, rows in groups}
    draw_ranked(ax, curves, "eigenvalue of the score matrix, σ²/E")
    ax.legend()


def draw_ranked(ax: Axes, curves: Mapping[str, Table], label: str) -> None:
    """Eigenvalues above their numerical floor by rank, one curve per entry."""
    for (name, table), color in zip(curves.items(), _style.shades(len(curves)), strict=True):
        rows = table.where(above_floor=True)
        ax.plot(rows["rank"], rows["eigenvalue"], color=color, label=name)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel=label)


def _styles(paths: Table) -> Styles:
    """Color by pair of minima, marker by AutoNEB seed, as in the paper."""
    pairs, seeds = list(paths.group_by("from", "to")), list(paths.group_by("neb_seed"))
    return {
        str(row["path"]): (
            _style.COLORS[pairs.index((row["from"], row["to"])) % len(_style.COLORS)],
            _style.MARKERS[seeds.index(row["neb_seed"]) % len(_style.MARKERS)],
            f"{row['from']}-{row['to']}, {row['neb_seed']}",
        )
        for row in paths.rows()
    }
