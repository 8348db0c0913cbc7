"""Tasks for the tests of the schedule, in a module that worker processes can import."""

from __future__ import annotations

import os
import resource
import signal
import time

import torch
from rich.console import Console

from entropic_fast._utils.table import Table
from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments._executor import execute
from entropic_fast.experiments._run_folder import RunFolder
from entropic_fast.ops.random_bits.streams import normal


def first(run, progress, seed):
    """A table and tensors; leaves a line in a log each time it is computed."""
    log(run, f"first/{seed}")
    progress(0.5)
    values = normal((50,), seed)
    return {
        "values": Table({"x": values.double().tolist()}),
        "weights": {"values": values},
        "about": {"seed": seed, "threads": torch.get_num_threads()},
    }


def second(run, progress, *seeds):
    """The sum of what several first tasks stored."""
    log(run, "second")
    total = sum(run.tensors(f"first/{seed}", "weights")["values"] for seed in seeds)
    return {"sum": Table({"x": total.double().tolist()})}


def fails(run, progress):
    raise ValueError("that cannot be computed")


def full_disk(run, progress):
    raise OSError(28, "No space left on device", "somewhere")


def dies(run, progress):
    os._exit(9)


def log(run, text):
    with open(run.path / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{text} {os.getpid()}\n")


def slow(run, progress, seed):
    """Long enough for other processes to want it too."""
    log(run, f"slow/{seed}")
    time.sleep(0.2)
    return {"values": Table({"x": [float(seed)]})}


def stops_once(run, progress):
    """Kills its process the first time; ends the second."""
    log(run, "stops")
    if not (run.path / "killed.txt").exists():
        (run.path / "killed.txt").write_text("once")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"values": Table({"x": [1.0]})}


def has_no_room_once(run, progress):
    """The first time, this process can write no file of more than 100 bytes from here on."""
    log(run, "full")
    if not (run.path / "full.txt").exists():
        (run.path / "full.txt").write_text("once")
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit))
    return {"values": Table({"x": [float(i) for i in range(1000)]})}


def race(path, tasks):
    """Compute all tasks of a run, as one of several commands at its folder."""
    run = RunFolder.create(path, load_preset("demo"))
    execute(run, tasks, workers=1, console=Console(quiet=True))
