"""Charts of the recorded benchmarks: bars against peers, growth against size.

    python docs/make_charts.py

draws docs/charts/*.svg from benchmarks/results/*.json. Every number in a chart is in the record
that its caption names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CHARTS = Path(__file__).parent / "charts"
OURS, PEER = "#0072b2", "#999999"

# (panel, record, [(label, key of the record's seconds)]); times in plain gradients of the batch.
SPEED = [
    (
        "Hessian products (8 vectors, per vector)",
        "hessian-products-resnet20-cpu",
        [
            ("entropic_fast", "ours, 8 products"),
            ("double backward, graph kept", "double backward, graph kept"),
            ("hessian-eigenthings", "hessian-eigenthings"),
            ("torch jvp(grad)", "jvp(grad)"),
            ("curvlinops", "curvlinops, 8"),
        ],
    ),
    (
        "Trace probes v'Hv (8, per probe)",
        "hessian-products-resnet20-cpu",
        [
            ("entropic_fast", "ours, 8 probes"),
            ("double backward, graph kept", "double backward, graph kept"),
            ("hessian-eigenthings", "hessian-eigenthings"),
            ("torch jvp(grad)", "jvp(grad)"),
            ("curvlinops", "curvlinops, 8"),
        ],
    ),
    (
        "Per-example gradient norms",
        "score-norms-resnet20-cpu",
        [
            ("entropic_fast", "ours"),
            ("torch vmap(grad)", "vmap(grad)"),
            ("BackPACK", "BackPACK BatchL2Grad"),
        ],
    ),
]

# Of each network: ours, and the faster of the peers in the same record, by panel. Double backward
# builds its graph for each product; with its graph kept it has not been measured there.
NETWORKS = [
    ("ViT", "modern-vit-cpu"),
    ("GPT", "modern-gpt-cpu"),
    ("resnet18", "modern-resnet18-cpu"),
]
MODERN = [
    ("ours, 4 products at a fixed point", ("double backward", "jvp(grad)")),
    ("ours, trace by 8 probes", ("double backward", "jvp(grad)")),
    ("ours, norms", ("vmap(grad), norms", "vmap(grad) by fours, norms")),
]


def seconds(name: str) -> dict[str, Any]:
    """The timings of a record."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["seconds"]
    return found


def bars(ax: Any, title: str, record: str, rows: list[tuple[str, str]]) -> None:
    """One panel: medians in plain gradients, with the quartiles as a line."""
    timings = seconds(record)
    unit = timings["plain gradient"]["median"]
    for i, (label, key) in enumerate(reversed(rows)):
        median = timings[key]["in plain gradients"]
        # Times per vector: the ratio to the median carries the quartiles over.
        low, high = (median * q / timings[key]["median"] for q in timings[key]["quartiles"])
        ax.barh(i, median, color=OURS if label == "entropic_fast" else PEER, height=0.7)
        ax.plot([low, high], [i, i], color="black", linewidth=1)
        ax.text(max(high, median) + 0.06, i, f"{median:.2f}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)], fontsize=8)
    ax.axvline(1, color="black", linewidth=0.6, linestyle=":")
    ax.set_xlim(0, 6)
    ax.set_title(title, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    assert unit > 0


def modern_bars(ax: Any, ours: str, peers: tuple[str, ...]) -> None:
    """One panel: a pair of bars for each network."""
    for i, (_, record) in enumerate(reversed(NETWORKS)):
        timings = seconds(record)
        best = min((p for p in peers if p in timings), key=lambda p: timings[p]["median"])
        for key, offset, color in ((best, -0.2, PEER), (ours, 0.2, OURS)):
            ratio = timings[key]["in plain gradients"]
            ax.barh(i + offset, ratio, color=color, height=0.38)
            at = min(ratio, 6) + 0.06  # a longer bar is cut off, and says its length
            ax.text(at, i + offset, f"{ratio:.2f}", va="center", fontsize=7)
    ax.set_yticks(range(len(NETWORKS)), [label for label, _ in reversed(NETWORKS)], fontsize=8)
    ax.axvline(1, color="black", linewidth=0.6, linestyle=":")
    ax.set_xlim(0, 6)
    ax.spines[["top", "right"]].set_visible(False)


def speed() -> Any:
    """Bars against peers: on ResNet-20, 128 images; on a ViT, a GPT and resnet18, 32 examples."""
    figure, axes = plt.subplots(
        3, 2, figsize=(10, 5.6), height_ratios=[len(rows) for _, _, rows in SPEED],
        layout="constrained",
    )  # fmt: skip
    panels = zip(axes, SPEED, MODERN, strict=True)
    for (left, right), (title, record, rows), (ours, peers) in panels:
        bars(left, title, record, rows)
        modern_bars(right, ours, peers)
    axes[0, 1].set_title(
        "Modern networks: ours, double backward, vmap(grad)", fontsize=9, loc="left"
    )
    axes[-1, 0].set_xlabel("plain gradients, ResNet-20, 2 CPU cores")
    axes[-1, 1].set_xlabel("plain gradients; 4 vectors, 8 probes")
    return figure


def growth() -> Any:
    """Time of all Fisher eigenvalues' Gram matrix against the number of examples."""
    rows = json.loads((RESULTS / "score-growth-cpu.json").read_text())["examples"]
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    for key, label, color in (
        ("ours", "entropic_fast", OURS),
        ("vmap(grad) + Gram", "torch vmap(grad)", PEER),
        ("plain gradient", "one plain gradient pass", "#000000"),
    ):
        found = [(r["examples"], r["seconds"][key]["median"]) for r in rows if key in r["seconds"]]
        ax.plot(*zip(*found, strict=True), marker="o", markersize=3, color=color, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("examples")
    ax.set_ylabel("seconds")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    """Draw every chart."""
    CHARTS.mkdir(exist_ok=True)
    # Without a date and with one salt, a chart of the same records is the same file.
    with plt.rc_context({"svg.hashsalt": "entropic_fast"}):
        for draw in (speed, growth):
            draw().savefig(CHARTS / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
