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


@dataclass(frozen=True)
class Finding:
    """A row beside a figure: an effect with its interval, and what follows from it.

    Attributes:
        figure: name of the `FigureEntry` beside which it stands.
        panel: the figure's panel; "" for none.
        name: what was measured, in a few words.
        effect, interval: numbers as text; "" where there is none.
        verdict: what follows.
        tone: how the verdict is shown: "good", "bad", "open" or "muted".
        notes: what is folded: terms and their texts.
    """

    figure: str
    panel: str
    name: str
    effect: str
    interval: str
    verdict: str
    tone: str = "muted"
    notes: Sequence[tuple[str, str]] = ()


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
    """Write `report.html` of a folder: every figure with its findings beside it.

    All values are escaped. Where plotly is not installed figures are shown as drawn for print, and
    the page says so.

    Args:
        folder: the run folder, with the figures as SVG.
        template: a template that extends `page.html.jinja`.
        figures: in the order of the page.
        findings: those of a figure that is not on the page are listed after all figures.
        values: what the templates use.
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
        tone=_tone(claim.verdict),
        notes=[*notes.items(), ("Source", claim.source)],
    )


def _tone(verdict: str) -> str:
    return {HOLDS: "good", FAILS: "bad", UNDECIDED: "open"}.get(verdict, "muted")


def _counts(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """How many claims have each verdict, in the order holds, fails, undecided, others."""
    counts = Counter(dict.fromkeys((HOLDS, FAILS, UNDECIDED), 0))
    counts.update(claim.verdict for claim in claims)
    return [{"verdict": v, "count": n, "tone": _tone(v)} for v, n in counts.items() if n]


def _verdict_line(claims: Sequence[Claim]) -> str:
    """The run's verdict in one line. Claims that were not tested do not count."""
    counts = Counter(_tone(claim.verdict) for claim in claims)
    tested = counts["good"] + counts["bad"] + counts["open"]
    line = f"{counts['good']} of {tested} tested claims hold"
    if counts["bad"]:
        line += f", {counts['bad']} {'does' if counts['bad'] == 1 else 'do'} not"
    if counts["open"]:
        line += f"; for {counts['open']} the data do not suffice"
    return line + "."


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


def _interval(low: float, high: float) -> str:
    return f"{_figure(low)} to {_figure(high)}" if math.isfinite(low) else ""
