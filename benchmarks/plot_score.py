"""Seconds against E and against P as one figure: `python benchmarks/plot_score.py [JSON]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

COLORS = {"plain gradient": "0.6", "ours": "C0", "vmap(grad) + Gram": "C1"}


def draw(path: Path) -> Path:
    """Draws the record of `test_growth` beside it, as PNG and SVG; returns the PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = json.loads(path.read_text())
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for panel, axis, other in zip(
        panels, ("examples", "parameters"), ("parameters", "examples"), strict=True
    ):
        cells = sorted(record[axis], key=lambda cell: cell[axis])
        for name, color in COLORS.items():
            rows = [(cell[axis], cell["seconds"].get(name)) for cell in cells]
            known = [(x, row) for x, row in rows if row]
            x = [point for point, _ in known]
            y = [row["median"] for _, row in known]
            spread = [
                [row["median"] - row["quartiles"][0] for _, row in known],
                [row["quartiles"][1] - row["median"] for _, row in known],
            ]
            panel.errorbar(x, y, spread, color=color, marker="o", ms=3.5, capsize=2, label=name)
        panel.set(xscale="log", yscale="log", xlabel=f"{axis} ({'EP'[axis == 'parameters']})")
        panel.set_title(f"{other}: {cells[0][other]:,}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds for the score spectrum")
    panels[0].legend(frameon=False, fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=160)
    pyplot.close(figure)
    return path.with_suffix(".png")


if __name__ == "__main__":
    default = Path(__file__).parent / "results" / "score-growth-cpu.json"
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
