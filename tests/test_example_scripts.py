"""The scripts in examples/ run, at small settings, and print what they say they show."""

import json
import math
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entropic_fast.cli._main import app

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORDED = EXAMPLES.parent / "benchmarks" / "results" / "demo-cpu"
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


@pytest.fixture
def script(capsys):
    """`script(name)` loads a script; what `main` then prints is read with `printed()`."""

    def load(name):
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return names, lambda: capsys.readouterr().out

    return load


def number(pattern, text):
    (found,) = re.findall(pattern.replace("#", f"({NUMBER})"), text)
    return float(found) if isinstance(found, str) else [float(x) for x in found]


def test_every_script_is_short_and_says_what_it_shows():
    files = sorted(EXAMPLES.glob("*.py"))
    tested = set(re.findall(r'script\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {file.stem for file in files} == tested
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith('"""') and len(text.splitlines()) <= 50, file
        assert 'if __name__ == "__main__":' in text


def test_curvature_at_a_point(script):
    names, printed = script("curvature_at_a_point")
    names["main"](epochs=2, examples=48, probes=16, steps=15)
    text = printed()
    assert "14378 parameters, 48 examples" in text
    values = re.findall(rf"eigenvalue ({NUMBER}), residual ({NUMBER})", text)
    assert len(values) == 4
    assert all(float(r) <= 2e-3 * abs(float(v)) for v, r in values)
    first, error = number("random signs +# ± #", text)
    second, less = number("those eigenvalues exactly +# ± #", text)
    third, other = number("from the density +# ± #", text)
    assert abs(first - second) < 5 * math.hypot(error, less)
    assert abs(third - second) < 6 * math.hypot(other, less)
    assert number("squared eigenvalues +# ±", text) > max(float(v) ** 2 for v, _ in values)
    fisher, gauss_newton = number("Fisher matrix +#", text), number("Gauss-Newton matrix +#", text)
    assert fisher > 0 and gauss_newton > 0


def test_minimum_energy_path(script):
    names, printed = script("minimum_energy_path")
    names["main"](epochs=6, steps=15, points=3, probes=8)
    text = printed()
    line, path = number("straight line: barrier # nats", text), number("path:  barrier # ", text)
    assert path < 0.5 * line
    rows = re.findall(rf"s = ({NUMBER}): loss ({NUMBER}), Hessian trace ({NUMBER}) ± ", text)
    assert [row[0] for row in rows] == ["0.00", "0.50", "1.00"]
    assert all(float(row[2]) > 0 for row in rows)


def test_relaxation(script):
    names, printed = script("relaxation")
    names["main"](epochs=6, neb_steps=15, steps=30, replicas=3)
    noisy, still = printed().splitlines()
    found = number(r"moved # \[#, #\] \(95 %, mean, Student's t, 3 replicas\)", noisy)
    assert found[1] < found[0] < found[2]
    start, end = number("B = 512, from s = #: moved #", still)
    assert 0 < start < 1 and 0 <= start + end <= 1


def test_linear_mode_connectivity(script):
    names, printed = script("linear_mode_connectivity")
    names["main"](epochs=3, branches=(0, 3), points=3)
    text = printed()
    assert number("k = 0: barrier # nats", text) > 0
    assert number("k = 3: barrier # nats", text) == 0  # branched at the end: one network
    losses = re.search(r"loss on the first line: (.*)", text)[1].split()
    assert len(losses) == 3 and float(losses[1]) > max(float(losses[0]), float(losses[2]))


def test_langevin_ring(script):
    names, printed = script("langevin_ring")
    # 0.1 % of chi-square's tail on 11 degrees of freedom lies beyond 31.3.
    assert names["main"](particles=5000, steps=4000) < 31.3
    rows = [line.split() for line in printed().splitlines()[1:13]]
    stiffest = max(rows, key=lambda row: float(row[1]))
    flattest = min(rows, key=lambda row: float(row[1]))
    assert float(flattest[2]) > 1.5 * float(stiffest[2])


def test_claims_of_the_recorded_run_are_the_recorded_ones(script):
    names, printed = script("run_folder")
    found = names["main"]()
    stored = {c["name"]: c for c in json.loads((RECORDED / "claims.json").read_text())}
    text = printed()
    assert len(found) >= 8
    for claim in found:
        assert claim.verdict == stored[claim.name]["verdict"], claim.name
        assert claim.effect == pytest.approx(stored[claim.name]["effect"], rel=1e-9), claim.name
        assert claim.name in text


def test_a_run_is_resumed_and_judged_again(script, tiny_run, tiny, tmp_path):
    names, printed = script("run_folder")
    shutil.copytree(tiny_run.path, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "claims.json").read_text())
    (tmp_path / "run" / "claims.json").unlink()
    names["reproduce"](tmp_path / "run", overrides=tuple(tiny[1::2]))
    assert json.loads((tmp_path / "run" / "claims.json").read_text()) == before
    assert [c.name for c in names["main"](tmp_path / "run")] == [c["name"] for c in before]
    assert before[0]["name"] in printed()


def test_shared_curvature(script):
    names, printed = script("shared_curvature")
    names["main"](examples=48, probes=4)
    text = printed()
    assert "48 examples, 1 processes" in text and "gram on 1 processes" in text
    values = re.findall(rf"eigenvalue ({NUMBER}), residual ({NUMBER})", text)
    assert len(values) == 2 and all(float(r) <= 2e-3 * abs(float(v)) for v, r in values)
    first, second = number("score eigenvalues #, #", text)
    assert first > second > 0


def test_batch_scripts_are_whole_and_run_commands_there_are():
    scripts = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
    assert len(scripts) == 2
    for file in scripts:
        subprocess.run(["bash", "-n", str(file)], check=True)
        text = file.read_text(encoding="utf-8")
        assert text.startswith("#!/bin/bash") and "#SBATCH --time" in text
    shared, array = (file.read_text(encoding="utf-8") for file in reversed(scripts))
    (script,) = re.findall(r"examples/\w+\.py", shared)
    assert (EXAMPLES.parent / script).is_file()
    (command,) = re.findall(r"^entropic-fast (.*)$", array, re.M)
    ended = CliRunner().invoke(app, [*command.split()[:1], "--help"])
    assert ended.exit_code == 0
    for option in re.findall(r"--[a-z-]+", command):
        assert option in re.sub(r"\x1b\[[0-9;]*m", "", ended.output)
