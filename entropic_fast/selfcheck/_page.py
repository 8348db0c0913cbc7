"""The report of `entropic-fast check` on the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .._utils.terminal import say
from ._checking import Report
from ._speeds import AS_TORCH_IS_SET, Limits, Speed
from ._verdict import Check

UNITS = ("ms", "plain gradients", "of copies", "of products")


def print_report(console: Console, report: Report) -> None:
    """Tables of what was checked and how fast it is, then what is wrong and what to do."""
    facts = report.facts
    versions = facts["versions"]
    about = ", ".join(f"{name} {versions[name]}" for name in ("entropic_fast", "torch", "triton"))
    gpus = ", ".join(f"{gpu['name']} (sm_{gpu['capability']})" for gpu in facts["gpu"])
    say(console, f"{about}, commit {facts['commit']}")
    say(
        console,
        f"devices {', '.join(facts['devices'])}; GPUs: {gpus or 'none'}; "
        f"CPU {facts['cpu']['isa']}, {facts['cpu']['torch_threads']} threads",
    )
    for note in report.notes:
        say(console, f"skipped on {note}", "yellow")
    console.print(_operations(report.checks))
    console.print(_networks(report.checks))
    for device, rows in report.speeds.items():
        console.print(_speeds(device, report.limits[device], rows))
        for row in (row for row in rows if row.problem):
            say(console, f"not measured: {row.name} on {device}: {row.problem}", "yellow")
    for check in report.wrong:
        say(console, f"wrong: {check.finding()}", "red")
    for text in report.advice():
        say(console, text)
    verdict = "all is well" if report.ok else f"{len(report.wrong)} are wrong"
    say(console, f"{len(report.checks)} comparisons in {report.seconds:.0f} s: {verdict}")


def _operations(checks: list[Check]) -> Table:
    columns = ("operation", "device", "backend", "float32", "float64")
    table = Table(
        *columns, title="Operations against their float64 references", title_justify="left"
    )
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in (c for c in checks if c.kind == "op"):
        groups.setdefault((check.name, check.device, check.backend), []).append(check)
    for key, found in groups.items():
        cells = (_worst([c for c in found if c.dtype == dtype]) for dtype in ("float32", "float64"))
        table.add_row(*key, *cells)
    return table


def _networks(checks: list[Check]) -> Table:
    shown = [c for c in checks if c.kind == "network"]
    graphs = ["CUDA graphs"] if any(c.graphs for c in shown) else []
    columns = ("calculation", "device", "dtype", "compared with", "error", *graphs)
    table = Table(*columns, title="A small network with batch normalization", title_justify="left")
    for c in shown:
        last = [Text(c.graphs or "-")] if graphs else []
        table.add_row(c.name, c.device, c.dtype, c.against, _worst([c]), *last)
    return table


def _worst(checks: list[Check]) -> str:
    if not checks:
        return "-"
    worst = next((c for c in checks if not c.ok), max(checks, key=lambda c: c.error))
    if worst.message:
        return "[red]raised[/]"
    return f"{worst.error:.1e}" if worst.ok else f"[red]{worst.error:.1e}[/]"


def _speeds(device: str, limits: Limits, rows: list[Speed]) -> Table:
    rates = [
        "-" if rate is None else f"{rate / 1e9:.3g}"
        for rate in (limits.bandwidth, limits.float32, limits.float64)
    ]
    caption = (
        "Most that it does: copies {} GB/s, matrix products {} GFLOP/s in float32, "
        "{} in float64. All is in full precision".format(*rates)
    )
    if any(row.name == AS_TORCH_IS_SET for row in rows):
        caption += ", the unit too; as torch is set by default, convolutions are in TF32"
    table = Table(
        "work",
        *(Column(name, justify="right") for name in UNITS),
        title=f"Speeds on {device}",
        title_justify="left",
        caption=caption + ".",
        caption_justify="left",
    )
    for row in rows:
        if row.seconds is None:
            continue
        plain = "-" if row.gradients is None else f"{row.gradients:.2f}"
        shares = (_share(row.bandwidth), _share(row.arithmetic))
        table.add_row(row.name, f"{row.seconds * 1e3:.3g}", plain, *shares)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f} %"
