import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from entropic_fast._utils.atomic_io import write_sealed
from entropic_fast._utils.table import Table
from entropic_fast.experiments import _pipeline as stages
from entropic_fast.experiments import _report as report
from entropic_fast.experiments import claims
from entropic_fast.experiments._run_folder import RunFolder
from entropic_fast.experiments.figures import _style as plots

FIGURES = (*(f"fig{i}" for i in range(1, 10)), "force")
TABLES = [
    "fig1_ring",
    "fig1_ridge",
    "fig1_track",
    "fig2_curvature",
    "fig2_loss",
    "fig2_paths",
    "fig2_spectrum",
    "fig3_relaxation",
    "fig3_bands",
    "fig3_times",
    "fig3_survival",
    "fig4_optimizers",
    "fig4_bands",
    "fig4_times",
    "fig5_lines",
    "fig5_instability",
    *(f"fig{i}_{name}" for i in (6, 7) for name in ("lines", "instability")),
    *(f"fig8_{name}" for name in ("line", "relaxation", "bands")),
    *(f"fig9_{name}" for name in ("minima", "loss", "curvature", "relaxation", "bands")),
    "force_comparison",
    "force_bursts",
    "force_fit",
    "force_shares",
    "minima",
]


class Links(HTMLParser):
    """Tags, and everything a browser would fetch."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster") and value[0] != "#":
                self.fetched.append(value)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_report_holds_every_figure_and_fetches_nothing(tiny_run):
    html = (tiny_run.path / "report.html").read_text(encoding="utf-8")
    page = Links(html)
    icon, *sources = page.fetched
    assert icon == "data:," and len(sources) == len(FIGURES)
    for name, source in zip(FIGURES, sources, strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == (tiny_run.path / "figures" / f"{name}.svg").read_bytes()
    assert not {"iframe", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in html  # whatever the embedded script may know, it cannot fetch


def test_the_report_names_claims_tables_settings_and_times(tiny_run):
    html = (tiny_run.path / "report.html").read_text(encoding="utf-8")
    for claim in json.loads((tiny_run.path / "claims.json").read_text()):
        assert claim["verdict"] in html and claim["name"] in unescape(html)
    for table in TABLES[:-1]:
        assert f"data/{table}.csv" in html
    assert "&#34;epochs&#34;: 4" in html
    assert re.search(r"2 minima,\s+1 minimum energy paths", html)
    assert re.search(r"train \d+\.\d s", html)
    run = RunFolder.open(tiny_run.path)
    assert set(run.stage_seconds()) >= {"langevin", "train", "path", "curvature", "relax", "lmc"}


def test_claims_can_be_computed_again_from_the_csv_files_alone(tiny_run, tmp_path):
    data = shutil.copytree(tiny_run.path / "data", tmp_path / "data")
    again = claims.to_json(stages.evaluate_claims(data))
    stored = json.loads((tiny_run.path / "claims.json").read_text())
    assert again == stored and len(stored) == 38
    assert {c["verdict"] for c in stored} <= {
        claims.HOLDS,
        claims.FAILS,
        claims.UNDECIDED,
        claims.UNTESTED,
    }


def test_the_tables_behind_the_figures_round_trip(tiny_run, tmp_path):
    found = sorted(p.stem for p in (tiny_run.path / "data").iterdir())
    assert found == sorted(TABLES)
    for name in found:
        file = tiny_run.path / "data" / f"{name}.csv"
        table = Table.from_csv(file)
        assert table.num_rows > 0
        table.to_csv(tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == file.read_bytes()


def test_figures_exist_and_drawn_again_are_the_same_bytes(tiny_run, tmp_path, command):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    names = sorted(p.name for p in (copy / "figures").iterdir())
    assert names == sorted(f"{f}.{kind}" for f in FIGURES for kind in ("png", "svg"))
    shutil.rmtree(copy / "figures")
    shutil.rmtree(copy / "data")
    (copy / "report.html").unlink()
    ended = command("report", copy)
    assert ended.code == 0, ended.err
    before, after = content(tiny_run.path), content(copy)
    assert before.keys() == after.keys()
    assert [p for p in before if before[p] != after[p]] == []


def test_a_report_needs_no_images(tiny_run, tmp_path, monkeypatch):
    def no_images(*args, **kwargs):
        raise AssertionError("images were loaded")

    copy = RunFolder.open(shutil.copytree(tiny_run.path, tmp_path / "run"))
    (copy.path / "report.html").unlink()
    monkeypatch.setattr("entropic_fast.experiments._inputs._load", no_images)
    monkeypatch.setattr(plots, "save", lambda *a: None)
    stages.write_report(copy, Console(quiet=True))
    before, after = content(tiny_run.path), content(copy.path)
    assert [p for p in before if before[p] != after.get(p)] == []


def test_a_report_of_an_unfinished_or_damaged_run_names_the_task(tiny_run, tmp_path):
    copy = RunFolder.open(shutil.copytree(tiny_run.path, tmp_path / "run"))
    (copy.task_folder("lmc/s1-k0") / "line.csv").write_text("k\n")
    with pytest.raises(ValueError, match="1 tasks missing or damaged, as lmc/s1-k0; run"):
        stages.write_report(copy, Console(quiet=True))
    (copy.task_folder("langevin/ridge") / "done.json").unlink()
    with pytest.raises(ValueError, match="2 tasks missing or damaged, as langevin/ridge"):
        stages.write_report(copy, Console(quiet=True))


def test_text_that_comes_from_the_run_is_escaped(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    evil = '<script>alert("x")</script>'
    for name in ("config.json", "environment.json"):
        document = json.loads((copy / name).read_text())
        if name == "config.json":
            document["preset"] = document["data"]["name"] = document["model"]["name"] = evil
        else:
            document["platform"] = evil
        del document["sha256"]
        write_sealed(copy / name, document)
    claim = claims.Claim(evil, evil, evil, evil, 1.0, 0.5, 1.5, claims.HOLDS, evil)
    chart = {"title": evil, "data": [{"name": evil}], "layout": {}}
    entry = report.FigureEntry("fig1", evil, evil, (evil,), (chart,))
    minima = Table({evil: [1.0], "name": [evil]})
    report.write(RunFolder.open(copy), [claim], [entry], minima, [], [evil])
    html = (copy / "report.html").read_text(encoding="utf-8")
    written = html.replace(get_plotlyjs(), "")
    assert evil not in written and written.count("&lt;script&gt;") >= 13
    assert Links(written).tags.count("script") == 3  # the charts, Plotly, and what draws them


def test_without_plotly_figures_are_as_drawn_for_print_and_the_page_says_so(
    tiny_run, tmp_path, monkeypatch
):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    stages.write_report(RunFolder.open(copy), Console(file=io.StringIO()))
    html = (copy / "report.html").read_text(encoding="utf-8")
    assert "Interactive charts were left out" in html and "pip install plotly" in html
    tags = Links(html).tags
    assert tags.count("script") == 0 and tags.count("img") == tags.count("figure") > 0
    assert html.count("<details open>") == tags.count("figure")


def test_the_command_line_does_not_import_plotly():
    code = (
        "import sys; sys.modules['plotly'] = None\n"
        "from entropic_fast import cli\nassert not [m for m in sys.modules if m[:7] == 'plotly.']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_claims_are_printed_with_effect_interval_and_verdict():
    text = io.StringIO()
    report.print_claims(
        Console(file=text, width=140),
        [
            claims.Claim("1A", "one", "", "", 1.5, 1.25, 1.75, claims.HOLDS, ""),
            claims.Claim("2B", "two", "", "", 0.5, np.nan, np.nan, claims.FAILS, ""),
            claims.Claim("3C", "three", "", "", np.nan, np.nan, np.nan, claims.UNDECIDED, ""),
        ],
    )
    lines = text.getvalue().splitlines()
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines]
    rows = {row[1]: row for row in cells if len(row) == 5}
    assert rows["one"] == ["1A", "one", "1.5", "1.25 to 1.75", "holds"]
    assert rows["two"] == ["2B", "two", "0.5", "", "does not hold"]
    assert rows["three"] == ["3C", "three", "-", "", "not enough data"]
    assert lines[-1] == "Of 3 claims 1 holds, 1 does not hold, 1 has not enough data"
