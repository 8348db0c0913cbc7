"""What the README shows runs as it is shown."""

import json
import re
from pathlib import Path

import pytest

from entropic_fast.experiments.claims import UNTESTED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


# The networks there are not trained, and few probes are taken of them.
@pytest.mark.filterwarnings("ignore::entropic_fast.NotConvergedWarning")
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(block, "README.md", "exec"), names)
    header = (tmp_path / "profile.csv").read_text().splitlines()[0]
    assert header.startswith("s,loss,accuracy,fisher_trace")
    assert "±" in capsys.readouterr().out


def test_images_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).is_file(), target


def test_commands_of_the_readme_are_one_line_each():
    for name in ("demo", "test"):
        (command,) = re.findall(rf"<!-- {name} command -->\n```sh\n(.*?)\n```", README, flags=re.S)
        assert "\n" not in command and ".venv" in command


def test_a_person_reads_it_in_three_minutes():
    assert len(README.splitlines()) <= 130


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_table_of_findings_is_what_was_recorded():
    """Rounded as the text rounds: to two digits."""
    for column, name in ((1, "demo"), (2, "small")):
        claims = {
            c["name"]: c
            for c in json.loads((ROOT / f"benchmarks/results/{name}-cpu/claims.json").read_text())
        }
        for row, claim in (
            ("Hessian trace, interior over ends", "Hessian trace rises inside"),
            ("largest eigenvalue, interior over ends", "largest eigenvalue rises inside"),
        ):
            low, high = (f"{claims[claim][key]:.1f}" for key in ("low", "high"))
            assert f"{claims[claim]['effect']:.1f} [{low}, {high}]" == cells(row)[column]
        barrier = claims["loss stays far under the straight line's"]["effect"]
        assert float(f"{barrier:.2g}") == float(cells("barrier of the path over")[column])
        found = [claim["verdict"] for claim in claims.values()]
        counts = map(found.count, ("holds", "does not hold", "not enough data", UNTESTED))
        assert " / ".join(map(str, counts)) == cells("claims: hold /")[column]


def cells(start):
    (line,) = (x for x in FINDINGS.splitlines() if x.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]
