"""Run folders seen from outside: listed, verified, pruned, repeated and compared."""

import json
import os
import re
import shutil
import time

import pytest

from entropic_fast._utils import atomic_io as store
from entropic_fast._utils.table import Table
from entropic_fast.experiments import _runs as runs
from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments._run_folder import RunFolder


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A run's folder to spoil, in a folder of its own."""
    return shutil.copytree(tiny_run.path, tmp_path / "runs" / "one")


def words(text):
    return " ".join(text.split())


def test_the_list_says_what_runs_hold(copy, command, tmp_path):
    (tmp_path / "runs" / "no run").mkdir()
    found = runs.summary(copy)
    assert (found.preset, found.model, found.data) == ("demo", "digits-cnn", "digits")
    assert found.finished == found.tasks > 10 and not found.problem
    assert sum(count for _, count in found.verdicts) == len(
        json.loads((copy / "claims.json").read_text())
    )
    assert found.size == sum(f.stat().st_size for f in copy.rglob("*") if f.is_file())
    assert runs.find([tmp_path / "runs", copy]) == [copy]
    ended = command("runs", "list", copy.parent)
    assert ended.code == 0 and f"{found.tasks}/{found.tasks}" in ended.out


def test_a_run_that_cannot_be_read_is_listed_as_damaged(copy, command):
    (copy / "config.json").write_text("{")
    assert "config.json" in runs.summary(copy).problem
    ended = command("runs", "list", copy)
    assert ended.code == 0 and "damaged" in ended.out


def test_no_runs_is_an_error(tmp_path, command):
    ended = command("runs", "list", tmp_path)
    assert ended.code == 1 and "run folders" in ended.err


def test_every_damaged_file_is_named_with_its_task(copy, command):
    assert command("runs", "verify", copy).code == 0
    spoiled = {}
    for i, file in enumerate(sorted((copy / "tasks").rglob("*.*"))[::7]):
        data = file.read_bytes()
        if i % 3 == 0:
            file.write_bytes(data[: len(data) // 2])
        elif i % 3 == 1:
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            file.unlink()
        task = file.parent.relative_to(copy / "tasks").as_posix()
        spoiled.setdefault(task, []).append(file)
    # A task without its record is one that is not finished.
    expected = {u for u in spoiled if (copy / "tasks" / u / "done.json").exists()}
    problems = dict(runs.verify(RunFolder.open(copy)))
    assert problems.keys() == expected and len(expected) > 3
    for task, text in problems.items():
        assert any(str(file) in text for file in spoiled[task])
    ended = command("runs", "verify", copy)
    assert ended.code == 1 and all(task in words(ended.out) for task in expected)


def test_only_what_no_command_needs_goes(copy, command):
    def content():
        return {f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.is_file()}

    before = content()
    assert "nothing to delete" in command("runs", "prune", copy, "--yes").out
    (copy / "data" / ".fig1.csv.abc.part").write_bytes(b"cut off")
    assert "nothing to delete" in command("runs", "prune", copy, "--yes").out  # or being written
    long_ago = time.time() - 2 * runs.CUT_OFF
    os.utime(copy / "data" / ".fig1.csv.abc.part", (long_ago, long_ago))
    (copy / "tasks" / "train" / "0" / "run.safetensors").write_bytes(b"a checkpoint")
    shutil.copytree(copy / "tasks" / "train" / "0", copy / "tasks" / "train" / "77")
    ended = command("runs", "prune", copy)
    assert "3 to delete; pass --yes" in words(ended.out) and content() != before
    ended = command("runs", "prune", copy, "--yes")
    assert ended.code == 0 and "deleted" in ended.out
    assert content() == before
    assert command("runs", "verify", copy).code == 0


def test_results_without_their_record_are_not_called_whole(copy, command):
    (copy / "manifest.json").unlink()
    ended = command("runs", "verify", copy)
    assert ended.code == 1 and "manifest.json: expected the record" in words(ended.out)
    assert command("report", copy).code == 0
    assert command("runs", "verify", copy).code == 0


def test_like_repeats_a_runs_configuration(copy, command, tmp_path):
    again = tmp_path / "again"
    ended = command("langevin", "--like", copy, "--out", again, "--workers", 1)
    assert ended.code == 0, ended.err
    run, first = RunFolder.open(again), RunFolder.open(copy)
    assert run.config == first.config and run.images() == first.images()
    one, other = (r.task_folder("langevin/ring-cold") for r in (first, run))
    files = sorted(f.name for f in one.glob("*.csv"))
    assert files and all((one / f).read_bytes() == (other / f).read_bytes() for f in files)
    changed = command(
        "langevin", "--like", copy, "--out", tmp_path / "changed", "--set", "langevin.steps=100"
    )
    assert changed.code == 0, changed.err
    assert RunFolder.open(tmp_path / "changed").config.langevin.steps == 100
    both = command("langevin", "--like", copy, "--preset", "demo", "--out", tmp_path / "both")
    assert both.code == 1 and "--like" in both.err


def test_a_preset_can_be_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nepochs = 30\n")
    config = load_preset(str(file), ["train.lr=0.5"])
    assert (config.preset, config.train.epochs, config.train.lr) == ("mine", 30, 0.5)
    file.write_text("[train\n")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 50_000 + "]" * 50_000)
    with pytest.raises(ValueError, match=r"deep\.toml: expected TOML"):
        load_preset(str(tmp_path / "deep.toml"))
    with pytest.raises(ValueError, match=r"mine\.toml: expected TOML"):
        load_preset(str(file))
    with pytest.raises(FileNotFoundError):
        load_preset(str(tmp_path / "none.toml"))


def test_claims_are_recomputed_from_the_csv_files_alone(copy, command, tmp_path):
    shutil.copytree(copy / "data", tmp_path / "bare" / "data")
    ended = command("claims", tmp_path / "bare")
    assert ended.code == 0 and ended.out == command("claims", copy).out
    count = len(json.loads((copy / "claims.json").read_text()))
    assert f"Of {count} claims" in ended.out
    ended = command("claims", tmp_path)
    assert ended.code == 1 and "finished run" in ended.err


def test_two_runs_claims_stand_side_by_side(copy, command, tmp_path):
    other = shutil.copytree(copy, tmp_path / "two")
    ended = command("claims", "compare", copy, other)
    assert ended.code == 0 and "0 verdicts differ" in words(ended.out)
    for folder, kind in ((copy, "line"), (other, "path")):  # which of them has the barrier
        loss = Table.from_csv(folder / "data" / "fig2_loss.csv")
        columns = {name: loss[name] for name in loss.columns}
        rows = (columns["kind"] == kind).nonzero()[0]
        columns["loss"] = 0.1 * columns["kind"].size + 0 * columns["loss"]
        columns["loss"][rows[len(rows) // 2]] += 1e3
        columns["loss"][(columns["kind"] == "line").nonzero()[0][1]] += 1.0
        Table(columns).to_csv(folder / "data" / "fig2_loss.csv")
    ended = command("claims", "compare", copy, other)
    assert ended.code == 1 and "fig2_loss.csv" in ended.err  # not the tables that were written
    for folder in (copy, other):
        (folder / "manifest.json").unlink()
    ended = command("claims", "compare", copy, other)
    assert ended.code == 0 and "[bold]" not in ended.out
    assert re.search("differ +│", ended.out)
    assert "1 verdicts differ" in words(ended.out) and "0 settings differ" in words(ended.out)
    config = store.read_sealed(other / "config.json")
    config["train"]["lr"] = 0.25
    store.write_sealed(other / "config.json", config)
    ended = command("claims", "compare", copy, other)
    assert "1 settings differ: train.lr: 0.1 -> 0.25" in words(ended.out)
    (other / "config.json").write_text("{}")
    ended = command("claims", "compare", copy, other)
    assert ended.code == 0 and "settings not compared" in words(ended.out)
    ended = command("claims", copy, other)
    assert ended.code == 1 and "compare A B" in ended.err


def test_the_list_tells_results_that_were_edited(copy, command):
    assert not runs.summary(copy).damage
    assert "damaged" not in command("runs", "list", copy).out
    file = copy / "data" / "fig2_loss.csv"
    file.write_text(file.read_text() + "\n")
    assert "fig2_loss.csv" in runs.summary(copy).damage
    assert "damaged" in command("runs", "list", copy).out


def test_a_result_that_cannot_be_read_is_named(copy, command):
    file = copy / "data" / "fig2_loss.csv"
    file.unlink()
    file.mkdir()  # as one without permission: reading raises OSError
    assert "got Is a directory" in runs.summary(copy).damage
    assert "damaged" in command("runs", "list", copy).out
    assert "fig2_loss.csv" in command("runs", "verify", copy).out
    file.rmdir()
    assert "got No such file" in runs.summary(copy).damage


def test_the_list_of_a_run_at_work_passes_over_files_that_vanish(copy, monkeypatch):
    whole = runs.summary(copy)
    gone = copy / "tasks" / ".theta.json.part"
    found = [*copy.rglob("*"), gone]
    monkeypatch.setattr(type(copy), "rglob", lambda self, pattern: iter(found))
    assert runs.summary(copy) == whole
