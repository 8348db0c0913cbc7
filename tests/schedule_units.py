"""Units for the tests of the schedule, in a module that worker processes can import."""

from __future__ import annotations

import os

import torch

from entropic_fast.random import normal
from entropic_fast.table import Table


def first(run, report, seed):
    """A table and tensors; leaves a line in a log each time it is computed."""
    log(run, f"first/{seed}")
    report(0.5)
    values = normal((50,), seed)
    return {
        "values": Table({"x": values.double().tolist()}),
        "weights": {"values": values},
        "about": {"seed": seed, "threads": torch.get_num_threads()},
    }


def second(run, report, *seeds):
    """The sum of what several first units stored."""
    log(run, "second")
    total = sum(run.tensors(f"first/{seed}", "weights")["values"] for seed in seeds)
    return {"sum": Table({"x": total.double().tolist()})}


def fails(run, report):
    raise ValueError("that cannot be computed")


def full_disk(run, report):
    raise OSError(28, "No space left on device", "somewhere")


def dies(run, report):
    os._exit(9)


def log(run, text):
    with open(run.path / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{text} {os.getpid()}\n")
