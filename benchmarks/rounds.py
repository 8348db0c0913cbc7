"""Rivals timed in turns within one process, and peak memory in a process of its own.

In every round each rival runs once, in an order of its own, so that a change in the machine's load
and what others leave in the caches meet all of them alike. Medians and quartiles are over rounds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

FULL = os.environ.get("ENTROPIC_FAST_BENCH") == "full"
DEVICE = os.environ.get("ENTROPIC_FAST_BENCH_DEVICE", "cpu")
RESULTS = Path(__file__).parent / "results"


@dataclass
class Rounds:
    """Seconds of each rival, one for every round it took part in."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # what each returned last
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def summary(self) -> dict[str, dict[str, Any]]:
        rows = {}
        for name, seconds in self.seconds.items():
            low, high = (
                quantiles(seconds, n=4, method="inclusive")[::2]
                if len(seconds) > 1
                else (seconds[0], seconds[0])
            )
            rows[name] = {
                "median": median(seconds),
                "quartiles": [low, high],
                "rounds": len(seconds),
            }
        return rows


def synchronize() -> None:
    if DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


def release() -> None:
    """Gives the system back what is no longer used, for a rival that needs gigabytes."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def take_turns(
    rivals: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    most: dict[str, int] | None = None,
    warm_up: bool = True,
    limit: float = 270.0,
    large: bool = False,
    repeats: dict[str, int] | None = None,
) -> Rounds:
    """Runs all rivals in turns, in another order every round.

    A rival finds in the caches what the one before it left there; one order for all rounds would
    favor some.

    Args:
        rivals: what to run, by name. One that raises is left out and named in `failed`.
        rounds: rounds to take, fewer if `limit` seconds have passed after one.
        most: rounds for those rivals that are too slow for all.
        warm_up: one round before that is not counted.
        large: return freed memory to the system before each turn.
        repeats: calls in one turn of rivals too quick to be timed alone; their mean counts.
    """
    out, begin = Rounds(), time.perf_counter()
    for turn in range(-1 if warm_up else 0, rounds):
        if turn > 0 and time.perf_counter() - begin > limit:
            break
        order = list(rivals.items())
        if turn > 0:
            random.Random(turn).shuffle(order)
        for name, rival in order:
            if name in out.failed or turn >= (most or {}).get(name, rounds):
                continue
            if large:
                release()
            calls = (repeats or {}).get(name, 1)
            started = time.perf_counter()
            try:
                for _ in range(calls):
                    value = rival()
            except Exception as error:  # of whatever kind: peers fail in their own ways
                if name.startswith("ours"):
                    raise
                out.failed[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            synchronize()
            seconds = (time.perf_counter() - started) / calls
            if turn >= 0:
                out.seconds.setdefault(name, []).append(seconds)
            out.values[name] = value
            del value
    return out


def calls_for(rival: Callable[[], Any], seconds: float) -> int:
    """How many calls take about so many seconds, judged by the second of two."""
    rival()
    synchronize()
    begin = time.perf_counter()
    rival()
    synchronize()
    return max(1, min(1000, int(seconds / (time.perf_counter() - begin))))


def table(rounds: Rounds, **ratios: float) -> dict[str, Any]:
    """Medians and quartiles, each also in units of what `ratios` names."""
    rows = rounds.summary()
    for row in rows.values():
        for unit, seconds in ratios.items():
            row[f"in {unit}"] = row["median"] / seconds
    return {"seconds": rows, "failed": rounds.failed}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors, relative to the second."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def store(name: str, record: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes a record as JSON: into `results/` at full size, into `folder` otherwise."""
    where = RESULTS if FULL or folder is None else folder
    device = "cpu" if DEVICE == "cpu" else torch.cuda.get_device_name().replace(" ", "-").lower()
    path = where / f"{name}-{device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def peak_in_subprocess(*arguments: object, timeout: float = 300) -> dict[str, Any]:
    """Peak memory of `python benchmarks/peak.py ARGUMENTS`, in bytes above what was there before.

    Returns:
        {"peak": bytes, "seconds": ...}, or {"failed": why}.
    """
    script = Path(__file__).with_name("peak.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {timeout:.0f} s"}
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        return {"failed": lines[-1][:300]}
    out: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return out
