"""The command line, from `--help` to a run killed and resumed."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import entropic_fast
from entropic_fast import __version__
from entropic_fast._utils import atomic_io as store
from entropic_fast.cli import _main as cli
from entropic_fast.experiments._run_folder import RunFolder
from entropic_fast.selfcheck import collect

STAGES = (
    "langevin",
    "train",
    "path",
    "curvature",
    "relax",
    "lmc",
    "straight-line",
    "bad-minimum",
    "reproduce",
)
ROOT = Path(entropic_fast.__file__).parents[1]
MAIN = [sys.executable, "-m", "entropic_fast.cli"]


def flat(text):
    return " ".join(text.split())


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tables(run):
    return {k: v for k, v in content(run / "tasks").items() if k.suffix in (".csv", ".safetensors")}


def refused(ended, *words):
    assert ended.code == 1 and ended.out == ""
    assert ended.err.startswith("error: ") and "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


# -- what needs no run ----------------------------------------------------------------------


def test_the_version_is_printed(command):
    ended = command("--version")
    assert (ended.code, ended.out.strip()) == (0, f"entropic_fast {__version__}")


def test_help_lists_every_command_and_its_options(command):
    ended = command("--help")
    assert ended.code == 0
    for name in (*STAGES, "report", "info", "check"):
        assert re.search(rf"\b{name}\b", ended.out)
    ended = command("reproduce", "--help")
    assert ended.code == 0
    for option in ("--preset", "--out", "--data-dir", "--set", "--workers", "--device"):
        assert option in ended.out


def test_info_says_what_runs_where(command):
    ended = command("info")
    assert ended.code == 0 and __version__ in ended.out
    assert str(collect()["backends"]["projected_step"]["cpu"]) in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "--preset", "huge"], ["preset: expected one of", "'demo'", "'huge'"]),
        (["train", "--set", "train.epoch=3"], ["train.epoch: expected one of seeds"]),
        (["train", "--set", "train.epochs=many"], ["train.epochs", "type int", "'many'"]),
        (
            ["langevin", "--device", "tpu"],
            ["--device: expected one of 'auto', 'cpu', 'cuda'", "tpu"],
        ),
        (["train", "--data-dir", "nowhere"], ["data_dir", "nowhere"]),
        (["train", "--set", "model.name=vgg"], ["model name: expected one of", "'vgg'"]),
        (["train", "--set", "lmc.model=vgg"], ["model name: expected one of", "'vgg'"]),
        (["train", "--set", "data.name=mnist"], ["mnist"]),
        (["train", "--set", "relax.batch_sizes=[8,9999]"], ["relax.batch_sizes", "9999"]),
        (["train", "--set", "data.curvature_examples=9999"], ["data.curvature_examples", "9999"]),
        (["train", "--set", "data.norm_examples=9999"], ["data.norm_examples", "9999"]),
    ],
)
def test_bad_input_is_one_readable_message(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(command(*arguments, "--out", "run"), *words)
    assert not (tmp_path / "run" / "tasks").exists()


@pytest.mark.parametrize("arguments", [["dance"], ["train", "--epochs", "3"], ["report"]])
def test_bad_usage_ends_with_status_two(command, arguments):
    ended = command(*arguments)
    assert ended.code == 2 and "Traceback" not in ended.err and "Usage" in ended.err


def test_a_report_of_no_run_is_refused(command, tmp_path):
    refused(command("report", tmp_path), "RUN: expected a run folder", str(tmp_path))
    refused(command("report", tmp_path / "nowhere"), "nowhere")


def test_messages_are_not_read_as_markup_and_not_broken(command, tmp_path):
    long = tmp_path / ("[bold]" + "x" * 90)
    refused(command("report", long), str(long))


# -- a whole run ----------------------------------------------------------------------------


def test_each_part_does_its_task_and_no_more(tiny_run):
    expected = {
        "langevin": (3, 3),
        "train": (2, 2),
        "path": (1, 3),
        "curvature": (2, 5),
        "relax": (11, 14),
        "lmc": (11, 11),
        "straight-line": (2, 13),
        "bad-minimum": (4, 6),
    }
    for stage, (new, all_tasks) in expected.items():
        ended = tiny_run.ended[stage]
        assert ended.code == 0, ended.err
        assert len(re.findall(r"^\[\d+/\d+\] ", ended.err, re.M)) == new
        kept = f"{all_tasks - new} of {all_tasks} tasks are finished already and kept"
        assert (kept in ended.err) == (all_tasks > new)
        assert ended.out.startswith(f"{stage}: finished; its files are under {tiny_run.path}")


def test_reproduce_ends_with_the_claims_and_the_report(tiny_run):
    ended = tiny_run.ended["reproduce"]
    assert ended.code == 0, ended.err
    assert ended.err == ""  # the parts had finished every task
    assert "Of 38 claims " in ended.out and "report.html" in ended.out
    for name in ("report.html", "claims.json", "config.json", "environment.json", "images.json"):
        assert (tiny_run.path / name).is_file()
    assert not list(tiny_run.path.rglob("*.part"))


def test_the_same_folder_with_another_configuration_is_refused(tiny_run, tiny, command):
    before = content(tiny_run.path)
    ended = command("reproduce", "--out", tiny_run.path, *tiny, "--set", "train.epochs=5")
    refused(ended, "--out: expected a new folder", "\n  train.epochs: 4 -> 5\n")
    assert content(tiny_run.path) == before


def test_a_missing_task_alone_is_computed_again_and_alike(tiny_run, tiny, command, tmp_path):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    before = tables(copy)
    stamps = {p: p.stat().st_mtime_ns for p in copy.glob("tasks/**/done.json")}
    shutil.rmtree(copy / "tasks" / "lmc" / "s1-k1")
    ended = command("lmc", "--out", copy, "--workers", 1, *tiny)
    assert ended.code == 0, ended.err
    assert "10 of 11 tasks are finished already and kept" in ended.err
    assert re.findall(r"\] (\S+) in", ended.err) == ["lmc/s1-k1"]
    assert tables(copy) == before
    assert {p for p, t in stamps.items() if p.stat().st_mtime_ns != t} == {
        copy / "tasks" / "lmc" / "s1-k1" / "done.json"
    }


def test_a_damaged_minimum_is_named_and_trained_again(tiny_run, tiny, command, tmp_path):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    before = tables(copy)
    file = copy / "tasks" / "train" / "1" / "minimum.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    ended = command("train", "--out", copy, "--workers", 1, *tiny)
    assert ended.code == 0 and f"damaged task train/1: {file}: expected" in ended.err
    assert re.findall(r"\] (\S+) in", ended.err) == ["train/1"]
    assert tables(copy) == before


def test_other_images_are_refused_on_resuming(tiny_run, tiny, command, tmp_path):
    copy = shutil.copytree(tiny_run.path, tmp_path / "run")
    run = RunFolder.open(copy)
    store.write_sealed(copy / "images.json", {"train_examples": 200, "train_sha256": "other"})
    assert run.images()["train_sha256"] == "other"
    ended = command("train", "--out", copy, *tiny)
    refused(ended, "--data-dir: expected the images", "begun with")


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_ends_with_advice_and_harms_nothing(
    command, tiny, tiny_run, tmp_path, monkeypatch, begun
):
    folder = tmp_path / "run"
    if begun:
        shutil.copytree(tiny_run.path, folder)
        (folder / "tasks" / "langevin" / "ridge" / "done.json").unlink()
    before = content(folder)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        ended = command("langevin", "--out", folder, "--workers", 1, *tiny)
    refused(ended, "No space left on device", str(folder), "run the same command again")
    locks = {name for name in content(folder) if name.parts[0] == "locks"}
    assert {
        n: data for n, data in content(folder).items() if n not in locks - before.keys()
    } == before
    ended = command("langevin", "--out", folder, "--workers", 1, *tiny)
    assert ended.code == 0 and (folder / "tasks" / "langevin" / "ridge" / "done.json").exists()


# -- a run that is killed -------------------------------------------------------------------


def children(pid):
    """Every process below `pid`, from /proc."""
    below = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                below += [child, *children(child)]
    return below


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(condition, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)


INTERRUPTED = "interrupted; finished tasks are kept, the same command goes on from them"


def test_an_interrupt_ends_with_one_line_and_its_exit_code(capfd):
    before = signal.getsignal(signal.SIGTERM)
    for ending, code in ((KeyboardInterrupt, 130), (signal.SIGTERM, 143)):
        with pytest.raises(typer.Exit) as ended, cli._interruptible():
            assert signal.getsignal(signal.SIGTERM) != before
            if ending is KeyboardInterrupt:
                raise KeyboardInterrupt
            signal.raise_signal(ending)
        assert ended.value.exit_code == code and signal.getsignal(signal.SIGTERM) == before
        assert flat(capfd.readouterr().err) == INTERRUPTED


# Of five minima some are not finished when a signal comes, however late it comes.
FIVE_MINIMA = [
    "train",
    *("--set", "data.train_limit=100", "--set", "data.curvature_examples=32"),
    *("--set", "train.seeds=[0,1,2,3,4]", "--set", "train.epochs=150"),
    *("--set", "lmc.branch_epochs=[0]", "--set", "bad_minimum.corrupted_labels=0"),
]


@pytest.fixture(scope="module")
def five_minima(command, tmp_path_factory):
    """The tables of an unbroken run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        folder = tmp_path_factory.mktemp("whole")
        assert command(*FIVE_MINIMA, "--out", folder, "--workers", 1).code == 0
    return tables(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_process_and_resumes_to_the_same_bytes(
    command, tmp_path, sent, monkeypatch, five_minima
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "run"
    arguments = [*FIVE_MINIMA, "--out", str(folder)]
    process = subprocess.Popen(
        [*MAIN, *arguments, "--workers", "2"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    tasks = folder / "tasks" / "train"
    wait_until(lambda: list(tasks.glob("*/done.json")) or process.poll() is not None, "a task")
    workers = children(process.pid)
    os.kill(process.pid, sent)
    _, said = process.communicate(timeout=60)
    finished = {p: p.stat().st_mtime_ns for p in tasks.glob("*/done.json")}
    assert len(workers) >= 2 and 1 <= len(finished) < 5
    if sent == signal.SIGTERM:
        assert process.returncode == 143 and flat(said).endswith(INTERRUPTED)
    wait_until(lambda: not any(map(alive, workers)), f"an end of {workers}", 20)

    ended = command(*arguments, "--workers", 1)
    assert ended.code == 0, ended.err
    assert f"{len(finished)} of 5 tasks are finished already and kept" in ended.err
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
    assert tables(folder) == five_minima
    assert len(five_minima) == 10


def test_a_folder_refused_before_anything_was_computed_takes_the_corrected_command(
    command, tmp_path
):
    out = ["--out", str(tmp_path / "run")]
    refused = command("langevin", *out, "--set", "data.name=foo", "--set", "langevin.steps=0")
    assert refused.code == 1
    asks_too_much = ["train", *out, "--set", "data.curvature_examples=99999"]
    refused = command(*asks_too_much)
    assert refused.code == 1 and "99999" in refused.err
    tiny_langevin = ["--set", "langevin.particles=500", "--set", "langevin.steps=20"]
    assert command("langevin", *out, *tiny_langevin).code == 0
