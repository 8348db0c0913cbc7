"""The report: one HTML file with every figure and claim inside, readable offline."""

from __future__ import annotations

import base64
import json
import math
import re
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
from .._utils.terminal import say
from . import _plotly as interactive
from ._config import changed_values
from ._run_folder import RunFolder
from .claims import FAILS, HOLDS, UNDECIDED, UNTESTED, Claim

MOST_SETTINGS = 20  # that a comparison of two runs lists
# By verdict: tone in the report, color on the terminal, words for one claim and for several.
TONES = {HOLDS: "good", FAILS: "bad", UNDECIDED: "open", UNTESTED: "muted"}
COLORS = {HOLDS: "green", FAILS: "red", UNDECIDED: "yellow", UNTESTED: "dim"}
WORDS = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not hold", "do not hold"),
    UNDECIDED: ("has not enough data", "have not enough data"),
    UNTESTED: ("is not tested at this scale", "are not tested at this scale"),
}


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the report: its file's stem, title, caption and the tables behind it."""

    name: str
    title: str
    caption: str
    tables: Sequence[str]
    charts: Sequence[Mapping[str, Any]] = ()
    source: str = ""


@dataclass(frozen=True)
class Finding:
    """A row beside a figure: an effect with its interval, and the verdict."""

    figure: str  # name of the `FigureEntry`
    panel: str  # of the figure; "" for none
    name: str
    effect: str
    interval: str
    verdict: str
    tone: str = "muted"  # of the verdict: "good", "bad", "open" or "muted"
    notes: Sequence[tuple[str, str]] = ()  # folded: terms and their texts


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
        [_finding(claim) for claim in claims],
        config=run.config,
        minima=minima.rows(),
        times=[row for table in times for row in table.rows()],
        num_paths=len(run.config.path.pairs) * len(run.config.path.seeds),
        verdict=_verdict_line(claims),
        counts=_counts(claims),
        environment=store.read_sealed(run.path / "environment.json"),
        stages=run.stage_seconds(),
        configuration=json.dumps(run.config.to_dict(), indent=1),
        notes=notes,
    )


def page(
    folder: Path,
    template: str,
    figures: Sequence[FigureEntry],
    findings: Sequence[Finding],
    **values: Any,
) -> None:
    """Write `report.html` of a folder with SVG figures: each figure with its findings beside it.

    All values are escaped. Without plotly the page has the SVG figures alone, and says so.

    Args:
        template: a template that extends `page.html.jinja`.
        findings: those of a figure that is not on the page are listed after all figures.
        values: variables of the template.
    """
    plotly = _plotly_script()
    if not plotly:
        figures = [replace(figure, charts=()) for figure in figures]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, trim_blocks=True
    )
    environment.filters["figure"] = _figure
    charts = {
        f"{figure.name}-{i}": {"data": chart["data"], "layout": chart["layout"]}
        for figure in figures
        for i, chart in enumerate(figure.charts)
    }
    names = {figure.name for figure in figures}
    html = environment.get_template(template).render(
        figures=[_entry(folder, f, [x for x in findings if x.figure == f.name]) for f in figures],
        other_findings=[finding for finding in findings if finding.figure not in names],
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
        interval = _interval(claim.low, claim.high)
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
    named = [{claim.name: claim for claim in claims} for claims in (first, second)]
    differ = 0
    for name, claim in (named[1] | named[0]).items():
        pair = [claims.get(name) for claims in named]
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
        say(console, f"settings not compared: {error}")
        return
    console.print(f"{len(changed)} settings differ" + (":" if changed else ""))
    for line in changed[:MOST_SETTINGS]:
        say(console, f"  {line}")
    if len(changed) > MOST_SETTINGS:
        console.print(f"  and {len(changed) - MOST_SETTINGS} others, in config.json")


def _cell(claim: Claim) -> str:
    interval = f" [{_figure(claim.low)}, {_figure(claim.high)}]" if math.isfinite(claim.low) else ""
    text = f"{_figure(claim.effect)}{interval}"
    return f"{escape(text)} [{COLORS[claim.verdict]}]{claim.verdict}[/]"


def _entry(folder: Path, figure: FigureEntry, findings: Sequence[Finding]) -> Mapping[str, Any]:
    svg = (folder / "figures" / f"{figure.name}.svg").read_bytes()
    return {**vars(figure), "findings": findings, "svg": base64.b64encode(svg).decode()}


def _finding(claim: Claim) -> Finding:
    number, panel = re.fullmatch(r"(\d*)(.*)", claim.figure, re.DOTALL).groups()  # type: ignore[union-attr]
    notes = {"Claim": claim.statement, "Effect": claim.measure, "Detail": claim.detail}
    return Finding(
        figure=f"fig{number}" if number else claim.figure,
        panel=panel if number else "",
        name=claim.name,
        effect=_figure(claim.effect),
        interval=_interval(claim.low, claim.high),
        verdict=claim.verdict,
        tone=TONES[claim.verdict],
        notes=[*notes.items(), ("Source", claim.source)],
    )


def _counts(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The number of claims with each verdict."""
    counts = Counter(claim.verdict for claim in claims)
    return [{"verdict": v, "count": counts[v], "tone": TONES[v]} for v in TONES if counts[v]]


def _verdict_line(claims: Sequence[Claim]) -> str:
    """The run's verdict in one line, on the claims that were tested."""
    counts = Counter(TONES[claim.verdict] for claim in claims)
    tested = counts["good"] + counts["bad"] + counts["open"]
    line = f"{counts['good']} of {tested} tested claims hold"
    if counts["bad"]:
        line += f", {counts['bad']} {'does' if counts['bad'] == 1 else 'do'} not"
    if counts["open"]:
        line += f"; for {counts['open']} the data do not suffice"
    return line + "."


def _count(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in claims)
    return f"Of {len(claims)} claims " + ", ".join(
        f"{counts[verdict]} {words[counts[verdict] > 1]}"
        for verdict, words in WORDS.items()
        if counts[verdict]
    )


def _figure(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _interval(low: float, high: float) -> str:
    return f"{_figure(low)} to {_figure(high)}" if math.isfinite(low) else ""
