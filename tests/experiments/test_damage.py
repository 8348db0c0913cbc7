"""Files of a finished run truncated, changed by a bit or swapped: each is found and named.

A few by default. A thousand, with the counts in benchmarks/results/trust-damage-cpu.json:
    ENTROPIC_FAST_TRUST=full pytest tests/experiments/test_damage.py -n 0
"""

import json
import os
import random
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest

from entropic_fast._utils.atomic_io import DamagedFileError
from entropic_fast.experiments import _runs as runs
from entropic_fast.experiments._run_folder import RunFolder

FULL = os.environ.get("ENTROPIC_FAST_TRUST") == "full"
TRIALS = 1000 if FULL else 60
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def copy(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("damage") / "run")


def damaged(kind, data, other, rng):
    if kind == "truncated":
        return data[: rng.randrange(len(data))]
    if kind == "swapped":
        return other
    place = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def problems(folder):
    """What is said of a run's files, whichever command meets them first."""
    try:
        return [text for _, text in runs.verify(RunFolder.open(folder))]
    except DamagedFileError as error:
        return [str(error)]


@pytest.mark.timeout(3600)
def test_every_damaged_file_is_found_and_named(copy, command):
    files = sorted(f for f in copy.rglob("*") if f.is_file() and f.suffix not in ("", ".lock"))
    rng = random.Random(0)
    tried, missed, places = Counter(), [], Counter()
    assert not problems(copy)
    while tried.total() < TRIALS:
        kind = rng.choice(["truncated", "bit flipped", "swapped"])
        # A few large tasks must not hide the others.
        file = rng.choice(rng.choice([files, [f for f in files if "tasks" not in f.parts]]))
        other = rng.choice([f for f in files if f.suffix == file.suffix])
        data = file.read_bytes()
        spoiled = damaged(kind, data, other.read_bytes(), rng)
        if spoiled == data:
            continue
        tried[kind] += 1
        places["task" if "tasks" in file.parts else "run"] += 1
        file.write_bytes(spoiled)
        if not any(str(file) in text for text in problems(copy)):
            missed.append((kind, file.relative_to(copy).as_posix()))
        if tried.total() % 10 == 0:  # nobody uses it, and nobody crashes
            words = ("claims", copy) if "data" in file.parts else ("runs", "verify", copy)
            ended = command(*words)
            assert ended.code == 1 and "Traceback" not in ended.err + ended.out
            assert file.name in "".join((ended.err + ended.out).split())
        file.write_bytes(data)
    assert not missed
    assert not problems(copy)
    if FULL:
        facts = runpy.run_path(str(RESULTS.parent / "conftest.py"))["facts"]()
        record = {**facts, "tried": dict(tried), "of": dict(places), "missed": len(missed)}
        (RESULTS / "trust-damage-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


@pytest.mark.parametrize("kind", ["truncated", "bit flipped", "swapped"])
def test_a_damaged_task_is_not_used_and_a_report_says_which(copy, command, kind):
    rng = random.Random(1)
    for file in sorted((copy / "tasks").rglob("*.csv"))[::9]:
        data = file.read_bytes()
        file.write_bytes(damaged(kind, data, b"s,loss\n0.0,1.0\n", rng))
        ended = command("report", copy)
        task = file.parent.relative_to(copy / "tasks").as_posix()
        assert ended.code == 1 and task in ended.err and "Traceback" not in ended.err
        file.write_bytes(data)
