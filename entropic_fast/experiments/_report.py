"""The report: one HTML file with every figure and claim inside, readable offline."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .._utils import atomic_io as store
from .._utils.table import Table
from . import _plotly as interactive
from ._config import changed_values
from ._run_folder import RunFolder
from .claims import FAILS, HOLDS, UNDECIDED, UNTESTED, Claim

MOST_SETTINGS = 20  # that a comparison of two runs lists
COLORS = {HOLDS: "green", FAILS: "red", UNDECIDED: "yellow", UNTESTED: "dim"}


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the report: its file's stem, title, caption and the tables behind it."""

    name: str
    title: str
    caption: str
    tables: Sequence[str]
    charts: Sequence[Mapping[str, Any]] = ()
    source: str = ""


def write(
    run: RunFolder,
    claims: Sequence[Claim],
    figures: Sequence[FigureEntry],
    minima: Table,
    times: Sequence[Table],
    notes: Sequence[str],
) -> None:
    """Write `report.html` from the run's figures and the claims."""
    page(
        run.path,
        "report.html.jinja",
        figures,
        config=run.config,
        claims=claims,
        minima=minima.rows(),
        times=[row for table in times for row in table.rows()],
        num_paths=len(run.config.path.pairs) * len(run.config.path.seeds),
        verdicts=_count(claims),
        environment=store.read_sealed(run.path / "environment.json"),
        stages=run.stage_seconds(),
        configuration=json.dumps(run.config.to_dict(), indent=1),
        notes=notes,
    )


def page(folder: Path, template: str, figures: Sequence[FigureEntry], **values: Any) -> None:
    """Write `report.html` of a folder from a template, with every figure inside.

    Whatever the values hold is escaped. Where plotly is not installed figures are shown as drawn
    for print, and the page says so.
    """
    plotly = _plotly_script()
    if not plotly:
        figures = [replace(figure, charts=()) for figure in figures]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, trim_blocks=True
    )
    environment.filters |= {"figure": _figure, "css": _css}
    environment.tests["finite"] = math.isfinite
    charts = {
        f"{figure.name}-{i}": {"data": chart["data"], "layout": chart["layout"]}
        for figure in figures
        for i, chart in enumerate(figure.charts)
    }
    html = environment.get_template(template).render(
        figures=[_entry(folder, f) for f in figures],
        charts=interactive.as_json(charts),
        plotly=plotly,
        **values,
    )
    store.write_text(folder / "report.html", html)


def _plotly_script() -> str:
    """Plotly's script; "" where the package is missing, as after an install with --no-deps."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return str(get_plotlyjs())


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    """The claims as a table on the terminal."""
    table = RichTable("figure", "claim", "effect", "95 % interval", "verdict")
    for claim in claims:
        interval = (
            f"{_figure(claim.low)} to {_figure(claim.high)}" if math.isfinite(claim.low) else ""
        )
        verdict = f"[{COLORS[claim.verdict]}]{claim.verdict}[/]"
        table.add_row(claim.figure, claim.name, _figure(claim.effect), interval, verdict)
    console.print(table)
    console.print(_count(claims))


def print_comparison(
    console: Console, one: tuple[Path, Sequence[Claim]], other: tuple[Path, Sequence[Claim]]
) -> None:
    """Two runs' claims side by side; verdicts that differ are marked."""
    (a, first), (b, second) = one, other
    table = RichTable("figure", "claim", str(a), str(b), "verdicts")
    known = [{claim.name: claim for claim in claims} for claims in (first, second)]
    differ = 0
    for name, claim in (known[1] | known[0]).items():
        pair = [claims.get(name) for claims in known]
        verdicts = {claim.verdict for claim in pair if claim is not None}
        differs = len(verdicts) > 1
        differ += differs
        cells = [_cell(claim) if claim is not None else "-" for claim in pair]
        table.add_row(claim.figure, name, *cells, "[bold]differ[/]" if differs else "")
    console.print(table)
    console.print(f"{a}: {_count(first)}\n{b}: {_count(second)}\n{differ} verdicts differ")
    if not all((path / "config.json").exists() for path in (a, b)):
        return
    try:
        changed = changed_values(*(store.read_sealed(p / "config.json") for p in (a, b)))
    except store.DamagedFileError as error:
        console.print(f"settings not compared: {error}", markup=False, soft_wrap=True)
        return
    console.print(f"{len(changed)} settings differ" + (":" if changed else ""))
    for line in changed[:MOST_SETTINGS]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(changed) > MOST_SETTINGS:
        console.print(f"  and {len(changed) - MOST_SETTINGS} others, in config.json")


def _cell(claim: Claim) -> str:
    interval = f" [{_figure(claim.low)}, {_figure(claim.high)}]" if math.isfinite(claim.low) else ""
    text = f"{_figure(claim.effect)}{interval}"
    return f"{escape(text)} [{COLORS[claim.verdict]}]{claim.verdict}[/]"


def _entry(folder: Path, figure: FigureEntry) -> Mapping[str, Any]:
    svg = (folder / "figures" / f"{figure.name}.svg").read_bytes()
    return {**vars(figure), "svg": base64.b64encode(svg).decode()}


_ONE = {
    HOLDS: "holds",
    FAILS: "does not hold",
    UNDECIDED: "has not enough data",
    UNTESTED: "is not tested at this scale",
}
_MORE = {
    HOLDS: "hold",
    FAILS: "do not hold",
    UNDECIDED: "have not enough data",
    UNTESTED: "are not tested at this scale",
}


def _count(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in claims)
    return f"Of {len(claims)} claims " + ", ".join(
        f"{counts[v]} {_ONE[v] if counts[v] == 1 else _MORE[v]}" for v in _ONE if counts[v]
    )


def _figure(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _css(verdict: str) -> str:
    return {HOLDS: "holds", FAILS: "fails", UNTESTED: "untested"}.get(verdict, "undecided")
