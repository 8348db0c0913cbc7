"""Drawing of figure 2."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...._utils.table import Table
from .. import _style

DISTANCE = "relative distance along the path"
Styles = dict[str, tuple[str, str, str]]  # of each path: color, marker, legend


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
            ax.errorbar(
                rows["s"],
                rows[column],
                _style.BAND * rows[error],
                fmt=f"{marker}-",
                color=color,
                capsize=2,
                label=text,
            )
        if column == "top_eigenvalue":
            _style.mark_unconverged(ax, curvature, "s", column, "top_eigenvalue_converged")
        ax.set_xlabel(DISTANCE)
        ax.set_ylabel(label)
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
    ax.set_yscale("log")
    ax.set_xlabel(DISTANCE)
    ax.set_ylabel(label)
    ax.legend()
    _style.letter(ax, "C", "loss along the paths")


def draw_spectrum(ax: Axes, table: Table) -> None:
    """Panel D: eigenvalues of the score matrix by rank, a curve a position."""
    positions = sorted(set(table["s"].tolist()))
    for s, color in zip(positions, _style.shades(len(positions)), strict=True):
        rows = table.where(s=s, above_floor=True)
        ax.plot(rows["rank"], rows["eigenvalue"], color=color, label=f"s = {s:.2f}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue of the score matrix, σ²/E")
    ax.legend()


def _styles(paths: Table) -> Styles:
    """Color by pair of minima, marker by AutoNEB seed, as in the paper."""
    pairs = list(dict.fromkeys((r["from"], r["to"]) for r in paths.rows()))
    seeds = list(dict.fromkeys(paths["neb_seed"].tolist()))
    return {
        str(row["path"]): (
            _style.COLORS[pairs.index((row["from"], row["to"])) % len(_style.COLORS)],
            _style.MARKERS[seeds.index(row["neb_seed"]) % len(_style.MARKERS)],
            f"{row['from']}-{row['to']}, {row['neb_seed']}",
        )
        for row in paths.rows()
    }
