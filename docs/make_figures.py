"""Tables of the figures' pages: sources, settings from the presets, claims from the recorded runs.

A page says where with a comment, `<!-- settings: path curvature -->`, `<!-- claims: 2A 2B -->`,
`<!-- verdicts: demo small -->` or `<!-- source: fig2 -->`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from make_benchmarks import RESULTS, table

from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments.figures import FIGURES

PRESETS = ("demo", "small", "paper")
MARKER = re.compile(r"<!-- (settings|claims|verdicts|source): ([\w. ]+) -->")


def filled(markdown: str) -> str:
    """A page with its tables in place of the comments."""

    def made(found: re.Match[str]) -> str:
        kinds = {"settings": settings, "claims": claims, "verdicts": verdicts, "source": source}
        return kinds[found[1]](found[2].split())

    return MARKER.sub(made, markdown)


def settings(sections: list[str]) -> str:
    """Every setting of the sections (or `section.key`s), by preset; and what the recorded runs had.

    Raises:
        KeyError: a section or key that no configuration has.
    """
    presets = {name: load_preset(name).to_dict() for name in PRESETS}
    keys = []
    for name in sections:
        section, _, key = name.partition(".")
        for known in [key] if key else presets["demo"][section]:
            if known not in presets["demo"][section]:
                raise KeyError(name)
            keys.append((section, known))
    rows = [
        [f"{section}.{key}", *(_value(presets[p][section][key]) for p in PRESETS)]
        for section, key in keys
    ]
    return table(["setting", *PRESETS], rows) + _recorded(presets, keys)


def _recorded(presets: dict[str, dict[str, Any]], keys: list[tuple[str, str]]) -> str:
    """What was different in the runs whose numbers are shown."""
    said = []
    for name, preset in presets.items():
        file = RESULTS / f"{name}-cpu" / "config.json"
        if not file.exists():
            continue
        stored = json.loads(file.read_text(encoding="utf-8"))
        before = [
            f"{section}.{key} = {_value(stored[section][key])}"
            for section, key in keys
            if section in stored
            and key in stored[section]
            and stored[section][key] != preset[section][key]
        ]
        if before:
            said.append(f"The recorded run of `{name}` was made with " + ", ".join(before) + ".")
        without = sorted({section for section, _ in keys if section not in stored})
        if without and _shown(name, without):
            sections = ", ".join(without)
            said.append(f"The recorded run of `{name}` is older than its section {sections}.")
    return "".join(f"\n{text}\n" for text in said)


def _shown(preset: str, sections: list[str]) -> bool:
    """Whether a preset has a figure with one of the sections."""
    config = load_preset(preset)
    figures = [f for f in FIGURES.values() if f.section and f.section.toml in sections]
    return not figures or any(figure.enabled(config) for figure in figures)


def source(names: list[str]) -> str:
    """Where figures are from."""
    return "".join(f"Source: {FIGURES[name].source}.\n" for name in names)


def claims(figures: list[str]) -> str:
    """Every claim of the figures, as the recorded runs have it."""
    runs = {
        name: {c["name"]: c for c in json.loads(file.read_text(encoding="utf-8"))}
        for name in PRESETS
        if (file := RESULTS / f"{name}-cpu" / "claims.json").exists()
    }
    found = {
        name: claim
        for run in runs.values()
        for name, claim in run.items()
        if claim["figure"] in figures
    }
    if not found:
        return "No recorded run has this figure yet.\n"
    rows = [
        [
            claim["figure"],
            claim["statement"],
            claim["source"],
            claim["measure"],
            *(_verdict(run.get(name)) for run in runs.values()),
        ]
        for name, claim in found.items()
    ]
    head = ["", "claim", "source", "measure", *(f"{name}, recorded" for name in runs)]
    return table(head, rows)


def verdicts(runs: list[str]) -> str:
    """How many claims of the recorded runs have each verdict, and which do not hold."""
    said, rows = [], []
    words = {
        "holds": "hold",
        "does not hold": "do not",
        "not enough data": "have not enough data",
        "not tested at this scale": "are not tested at this scale",
    }
    for name in runs:
        file = RESULTS / f"{name}-cpu" / "claims.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        counts = {w: sum(c["verdict"] == v for c in found) for v, w in words.items()}
        listed = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        said.append(f"Of the {len(found)} claims that `{name}` was tested on, {listed}.")
        rows += [
            [name, claim["figure"], claim["name"], _verdict(claim)]
            for claim in found
            if claim["verdict"] != "holds"
        ]
    return " ".join(said) + "\n\n" + table(["run", "figure", "claim", "verdict"], rows)


def _verdict(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "-"
    effect = claim["effect"]
    number = "-" if effect is None or not math.isfinite(effect) else f"{effect:.3g}"
    interval = "" if claim["low"] is None else f" [{claim['low']:.3g}, {claim['high']:.3g}]"
    return f"{number}{interval}: {claim['verdict']}"


def _value(value: object) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(map(_value, value)) + ")" if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
