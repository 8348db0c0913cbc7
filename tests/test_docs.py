"""The documentation's generated parts, and that it names all there is. Its build is in .ci/run."""

import doctest
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import entropic_fast as ef
from entropic_fast import curvature, dynamics, paths

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in DOCS.rglob("*.md")}


@pytest.fixture
def script(monkeypatch):
    """A module of docs/, whose packages need not be installed here."""
    monkeypatch.syspath_prepend(str(DOCS))
    if importlib.util.find_spec("griffe") is None:
        monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    return importlib.import_module


# -- benchmarks -----------------------------------------------------------------------------


def medians(record):
    if isinstance(record, dict):
        if "median" in record:
            yield record["median"]
        for value in record.values():
            yield from medians(value)
    elif isinstance(record, list):
        for value in record:
            yield from medians(value)


def test_the_page_of_benchmarks_shows_every_record(script):
    module = script("make_benchmarks")
    page = module.page()
    sections = page.split("\n### ")[1:]
    files = sorted(RESULTS.glob("*.json"))
    assert len(sections) == len(files) > 0
    for file in files:
        (section,) = [s for s in sections if f"`{file.name}`" in s]
        record = json.loads(file.read_text())
        assert record["commit"].split("+")[0][:9] in section
        assert ("with changes" in section) == record["commit"].endswith("+changes")
        assert record["versions"]["torch"] in section
        shown = set(re.findall(r"[\d.,e+-]+", section))
        for value in medians(record):
            assert shown & {module.number(value), module.number(1e3 * value)}, (file.name, value)


def test_every_kind_of_record_is_described(script):
    kinds = [kind for kind, _, _ in script("make_benchmarks").KINDS]
    for file in RESULTS.glob("*.json"):
        assert any(file.name.startswith(f"{kind}-") for kind in kinds), file.name


def test_a_record_of_a_new_kind_is_shown_too(script, tmp_path):
    row = {"median": 0.25, "quartiles": [0.2, 0.5], "rounds": 3, "in plain gradients": 2.0}
    record = {
        "commit": "0123456789abcdef",
        "seconds": {"<b>ours|*theirs*": row},
        "failed": {"peer": "ValueError: <script>"},
        "peers not installed": ["another"],
    }
    (tmp_path / "new-cpu.json").write_text(json.dumps(record))
    page = script("make_benchmarks").page(tmp_path)
    assert "## Other records" in page and "in plain gradients" in page
    assert "| 250 | 200 to 500 | 3 | 2 |" in page
    assert "peer failed: ValueError: &lt;script&gt;" in page
    assert "not timed: another" in page
    assert "<b>" not in page and "ours&#124;&#42;theirs&#42;" in page


def test_examples_in_the_scripts_hold(script):
    assert doctest.testmod(script("make_benchmarks")).failed == 0


# -- figures --------------------------------------------------------------------------------


def test_every_recorded_claim_is_on_one_page(script):
    module = script("make_figures")
    recorded = {  # figures 5 to 7 make the same statements, each on its own page
        (claim["figure"], claim["statement"])
        for file in RESULTS.glob("*/claims.json")
        for claim in json.loads(file.read_text())
    }
    shown = [
        pair
        for page in map(module.filled, PAGES.values())
        for pair in recorded
        if module.table(["", ""], [list(pair)]).splitlines()[2] in page
    ]
    assert sorted(shown) == sorted(recorded)


def test_tables_of_claims_have_what_was_recorded(script):
    text = script("make_figures").claims(["2A"])
    stored = json.loads((RESULTS / "demo-cpu" / "claims.json").read_text())
    claim = next(c for c in stored if c["name"] == "Hessian trace rises inside")
    effect, low, high = (f"{claim[key]:.3g}" for key in ("effect", "low", "high"))
    assert f"{effect} &#91;{low}, {high}&#93;: {claim['verdict']}" in text
    assert "No recorded run" in script("make_figures").claims(["99"])


def test_claims_that_fail_are_asked_about(script):
    text = script("make_figures").filled(PAGES["questions.md"])
    for name in ("demo", "small"):
        found = json.loads((RESULTS / f"{name}-cpu" / "claims.json").read_text())
        count = [claim["verdict"] for claim in found].count("holds")
        assert f"Of the {len(found)} claims that `{name}` was tested on, {count} hold," in text
        for claim in found:
            listed = f"| {name} | {claim['figure']} | {claim['name']} |" in text
            assert listed == (claim["verdict"] != "holds")
            if claim["verdict"] == "does not hold":
                asked = rf"\*\*[^*]*\b{claim['figure']}\b"  # in the text too, in bold
                assert re.search(asked, PAGES["questions.md"]), claim["name"]


def test_tables_of_settings_are_the_presets(script):
    from entropic_fast.experiments._config import load_preset

    text = script("make_figures").settings(["train.epochs", "relax.batch_sizes"])
    epochs = [str(load_preset(name).train.epochs) for name in ("demo", "small", "paper")]
    assert f"| train.epochs | {' | '.join(epochs)} |" in text
    sizes = ", ".join(map(str, load_preset("demo").relax.batch_sizes))
    assert f"({sizes})" in text
    with pytest.raises(KeyError, match=r"train\.epoch"):
        script("make_figures").settings(["train.epoch"])


def test_every_section_of_a_configuration_is_on_a_page(script):
    from entropic_fast.experiments._config import load_preset

    module = script("make_figures")
    named = " ".join(found[2] for page in PAGES.values() for found in module.MARKER.finditer(page))
    sections = {name.split(".")[0] for name in named.split()}
    known = {k for k, v in load_preset("demo").to_dict().items() if isinstance(v, dict)}
    assert known <= sections
    assert {f"figures/fig{i}.md" for i in range(1, 10)} | {"figures/force.md"} <= set(PAGES)


def test_settings_of_a_recorded_run_that_differ_are_said(script, tmp_path, monkeypatch):
    module = script("make_figures")
    stored = json.loads((RESULTS / "demo-cpu" / "config.json").read_text())
    stored["train"]["epochs"] = 7
    (tmp_path / "demo-cpu").mkdir()
    (tmp_path / "demo-cpu" / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    text = module.settings(["train.epochs"])
    assert "The recorded run of `demo` was made with train.epochs = 7." in text


# -- torch's derivatives -----------------------------------------------------------------


def test_the_page_on_numerics_names_every_derivative_that_torch_has_wrong():
    text = PAGES["numerics.md"].split("## Where torch's derivatives are wrong")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", text))
    files = sorted(RESULTS.glob("torch-derivatives-*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        wrong = record["not right in torch"] | record["not right under transforms"]
        assert not [name for name, row in wrong.items() if "WRONG" in row["here"]]
        names = {name.split()[0] for name in wrong} - {"weight"}  # of a convolution: _weight_norm
        assert names <= named


# -- compiled kernels -----------------------------------------------------------------------


def test_the_page_on_gpus_shows_every_compiled_kernel(script):
    module = script("make_kernels")
    page = module.filled(PAGES["gpu.md"])
    assert module.MARKER not in page
    record = json.loads(module.RECORD.read_text())
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name, kernels in record["kernels"].items():
        for kernel, archs in kernels.items():
            cells = module.table([name], [[kernel]]).splitlines()
            begin = cells[0].removesuffix("|") + cells[2]
            (row,) = [row for row in rows if row.startswith(begin)]
            registers = [numbers["registers"] for numbers in archs.values()]
            assert set(map(int, re.findall(r"\d+", row[len(begin) :].split("|")[0]))) == {
                *registers
            }
    for compiler, version in record["versions"].items():
        assert f"{compiler} {version}" in page
    assert doctest.testmod(module).failed == 0


# -- reference ------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference():
    documented = [
        name for page in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", page, flags=re.M)
    ]
    assert len(documented) == len(set(documented))
    names = {name.rpartition(".")[2] for name in documented}
    public = {*ef.__all__, *curvature.__all__, *paths.__all__, *dynamics.__all__}
    assert public - names == {"__version__"}
    for name in documented:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_docstrings_become_markdown(script):
    markdown = script("griffe_docstrings").markdown
    text = "A sum.  # [P]\n\nArgs:\n    a: rows, in\n        # [P] or [R, P]\n\n>>> 1  # [1]\n1"
    assert markdown(text) == (
        "A sum. `[P]`\n\nArgs:\n    a: rows, in\n        `[P] or [R, P]`\n\n"
        "```pycon\n>>> 1  # [1]\n1\n```"
    )
    assert (
        markdown("Example:\n    >>> 1\n    1")
        == "Example:\n    ```pycon\n    >>> 1\n    1\n    ```"
    )
    several = markdown("Attributes:\n    a, b: two of them.\n    c: one, d: not.")
    assert "    a,\u00a0b: two of them." in several and "c: one, d: not." in several
    for name in ef.__all__[1:]:
        found = markdown(getattr(ef, name).__doc__)
        assert found.count("```") % 2 == 0
        prose = re.sub(r"```pycon\n.*?```", "", found, flags=re.S)
        assert ">>>" not in prose and not re.search(r"(^|\s)# ", prose), name


# -- pages ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")  # few steps and probes
@pytest.mark.parametrize("name", ["index.md", *(n for n in PAGES if n.startswith("guide/"))])
def test_python_on_the_pages_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    if name == "guide/distributed.md":  # starts from the objective of the guide before
        x = torch.randn(8, 2)
        names["obj"] = ef.Objective(torch.nn.Linear(2, 1), "mse", (x, x[:, :1]))
        monkeypatch.setattr(ef, "distribute", lambda obj: obj)  # no other process here
    for block in re.findall(r"```python\n(.*?)```", PAGES[name], flags=re.S):
        exec(compile(block, f"docs/{name}", "exec"), names)
    if name in ("index.md", "guide/curvature.md", "guide/training.md"):
        assert "±" in capsys.readouterr().out


def test_charts_are_those_of_the_records(script, tmp_path, monkeypatch):
    module = script("make_charts")
    monkeypatch.setattr(module, "CHARTS", tmp_path)
    module.main()
    for chart in (DOCS / "charts").glob("*.svg"):
        drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / chart.name).read_text())
        assert drawn == re.findall(r"<!-- (.*?) -->", chart.read_text()), chart.name


def test_every_page_and_example_is_found():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert re.search(rf"[ \"]{re.escape(page)}$", config, flags=re.M), page
    for example in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{example.name}"' in PAGES["examples.md"], example.name


def test_formulas_are_balanced():
    for name, page in PAGES.items():
        prose = re.sub(r"```.*?```", "", page, flags=re.S)
        assert prose.count(r"\(") == prose.count(r"\)"), name
        assert prose.count(r"\[ ") == prose.count(r" \]"), name
