import errno
import json
import os
import shutil

import executor_tasks
import pytest
import torch
from rich.console import Console

from entropic_fast._utils import atomic_io as store
from entropic_fast._utils.table import Table
from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments._executor import Task, TaskError, execute
from entropic_fast.experiments._run_folder import RunFolder

TASKS = [Task(f"first/{seed}", executor_tasks.first, (seed,)) for seed in range(3)]


def new(path, *overrides):
    return RunFolder.create(path, load_preset("demo", overrides))


def run_tasks(run):
    console = Console(record=True, file=open(os.devnull, "w"), width=500)  # noqa: SIM115
    with console.file:
        execute(run, TASKS, workers=1, console=console)
    return console.export_text()


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_holds_configuration_and_environment(tmp_path):
    run = new(tmp_path / "deep" / "run", "seed=3")
    assert RunFolder.open(run.path).config == run.config
    facts = json.loads((run.path / "environment.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["cpu_count"] == os.cpu_count()


def test_the_same_configuration_opens_the_folder_again(tmp_path):
    new(tmp_path)
    assert new(tmp_path).config == load_preset("demo")


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    new(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"--out: .*\n  seed: 0 -> 1\n  train\.lr: 0\.1 -> 0\.2"):
        new(tmp_path, "train.lr=0.2", "seed=1")
    assert content(tmp_path) == before


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"--out: expected a new or empty folder.*other files"):
        new(tmp_path)
    assert list(content(tmp_path)) == [(tmp_path / "thesis.tex").relative_to(tmp_path)]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out: expected a folder, got .*which is a file"):
        new(tmp_path / "file")


def test_what_a_killed_first_write_left_does_not_count_as_other_files(tmp_path):
    (tmp_path / ".config.json.abc.part").write_text('{"pres')
    assert new(tmp_path).config == load_preset("demo")


def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="RUN: expected a run folder"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"preset": "demo", "nonsense": 1}', "\xff"])
def test_a_damaged_configuration_is_refused_by_name(tmp_path, text):
    new(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for again in (RunFolder.open, new):
        with pytest.raises(store.DamagedFileError, match=r"config\.json.*restore the file"):
            again(tmp_path)


def test_other_images_than_those_the_run_was_begun_with_are_refused(tmp_path):
    run = new(tmp_path)
    assert run.images() is None
    run.record_images({"train_examples": 5, "train_sha256": "aa"})
    run.record_images({"train_examples": 5, "train_sha256": "aa"})
    with pytest.raises(ValueError, match=r"--data-dir: expected the images.*begun with"):
        run.record_images({"train_examples": 5, "train_sha256": "bb"})
    assert run.images() == {"train_examples": 5, "train_sha256": "aa"}


def test_a_task_is_done_once_finished_and_its_parts_are_read_back(tmp_path):
    run = new(tmp_path)
    assert not run.is_done("a/b")
    weights = {"w": torch.randn(3, 2), "n": torch.tensor(3)}
    table = Table({"x": [1.5, float("nan")], "name": ["p", "q"]})
    run.finish("a/b", {"table": table, "weights": weights, "facts": {"k": [1, 2]}}, 1.25)
    assert run.is_done("a/b") and not run.is_done("a")
    assert run.table("a/b", "table").columns == ("x", "name")
    assert torch.equal(run.tensors("a/b", "weights")["w"], weights["w"])
    assert run.document("a/b", "facts") == {"k": [1, 2]}
    assert run.stage_seconds() == {"a": 1.25}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "file", ["values.csv", "weights.safetensors", "weights.json", "about.json", "done.json"]
)
def test_a_damaged_file_is_named_and_only_its_task_computed_again(tmp_path, damage, file):
    run = new(tmp_path)
    run_tasks(run)
    whole = content(run.path / "tasks")
    done = {u.name: (run.task_folder(u.name) / "done.json").stat().st_mtime_ns for u in TASKS}
    target = run.task_folder("first/1") / file
    data = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    elif damage == "truncated":
        target.write_bytes(data[: len(data) // 2])
    else:
        data[0] ^= 1
        target.write_bytes(data)

    said = run_tasks(run)
    if (file, damage) != ("done.json", "missing"):  # which says that it never was finished
        assert "damaged task first/1" in said and file in said
    assert "2 of 3 tasks are finished already and kept" in said
    computed = [line.split()[0] for line in (run.path / "log.txt").read_text().splitlines()]
    assert computed == [f"first/{i}" for i in (0, 1, 2, 1)]
    after = content(run.path / "tasks")
    same = {p for p in whole if p.name != "done.json"}  # which holds the time it took
    assert {p: after[p] for p in same} == {p: whole[p] for p in same}
    for name in ("first/0", "first/2"):
        assert (run.task_folder(name) / "done.json").stat().st_mtime_ns == done[name]
    assert all(run.is_done(u.name) for u in TASKS)


@pytest.mark.parametrize("record", ["[]", "{}", '{"files": {}}', "3"])
def test_a_record_that_is_none_counts_as_damage(tmp_path, record):
    run = new(tmp_path)
    run_tasks(run)
    (run.task_folder("first/1") / "done.json").write_text(record)
    with pytest.raises(store.DamagedFileError, match=r"done\.json"):
        run.is_done("first/1")
    assert "damaged task first/1" in run_tasks(run)
    assert run.is_done("first/1")


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system", "folder")


@pytest.mark.parametrize(
    ("broken", "error"), [("os.fsync", no_space), ("tempfile.mkstemp", read_only)]
)
def test_a_full_or_read_only_disk_is_an_error_that_harms_no_file(
    tmp_path, monkeypatch, broken, error
):
    run = new(tmp_path)
    run_tasks(run)
    (run.task_folder("first/1") / "done.json").unlink()
    before = content(run.path / "tasks")
    with monkeypatch.context() as patch:
        patch.setattr(broken, error)
        with pytest.raises(TaskError, match=r"first/1: .*(No space left|Read-only)"):
            run_tasks(run)
        with pytest.raises(OSError, match=r"No space left|Read-only"):
            new(tmp_path / "other")
    assert content(run.path / "tasks") == before  # neither changed, nor partial, nor left over
    assert all(name.parts[0] == "locks" for name in content(tmp_path / "other"))
    run_tasks(run)
    assert all(run.is_done(u.name) for u in TASKS)


@pytest.mark.parametrize("fails_at", range(5))
def test_a_disk_that_fills_up_between_two_files_leaves_the_task_unfinished(
    tmp_path, monkeypatch, fails_at
):
    run = new(tmp_path)
    calls, fsync = [], os.fsync

    def fills_up(handle):
        calls.append(handle)
        if len(calls) > fails_at:
            no_space()
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        with pytest.raises(TaskError, match=r"No space left on device: '.*first"):
            execute(run, TASKS[:1], workers=1, console=Console(quiet=True))
    assert not run.is_done("first/0")
    assert not list(tmp_path.rglob("*.part"))
    run_tasks(run)
    assert run.is_done("first/0")


def test_a_copy_of_a_run_is_a_run(tmp_path):
    run = new(tmp_path / "a")
    run_tasks(run)
    copy = RunFolder.open(shutil.copytree(run.path, tmp_path / "b"))
    assert all(copy.is_done(u.name) for u in TASKS)
