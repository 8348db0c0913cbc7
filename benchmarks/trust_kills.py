"""A run killed at random moments until it is finished, again and again: the same CSV files?

    python benchmarks/trust_kills.py KILLS [SEED]

Runs are those of the tests (every stage, at a size of seconds), with two workers. Each is killed
(SIGKILL, workers and all) after a random time and resumed by the same command, until it ends; then
all its tables are compared byte by byte with those of an unbroken run. Counts go to
benchmarks/results/trust-kills-cpu.json.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORTEST, LONGEST = 4.0, 20.0  # seconds before a kill: starting takes some of them


def command(out: Path) -> list[str]:
    tiny = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["TINY"]
    words = [word for override in tiny for word in ("--set", override)]
    code = "from entropic_fast.cli._main import main; main()"
    return [sys.executable, "-c", code, "reproduce", "--out", str(out), "--workers", "2", *words]


def tables(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.csv"))}


def killed_after(words: list[str], seconds: float) -> bool:
    """Whether the command was still running."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return True
    if status:
        raise SystemExit(f"the command failed with status {status}: {' '.join(words)}")
    return False


def main(kills: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    done, runs, different = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="entropic-fast-") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        killed_after(command(whole), 1e6)
        expected = tables(whole)
        while done < kills:
            words = command(broken)
            while killed_after(words, rng.uniform(SHORTEST, LONGEST)):
                done += 1
            runs += 1
            found = tables(broken)
            different += [name for name in expected if found.get(name) != expected[name]]
            different += [name for name in found if name not in expected]
            print(f"{done} kills, {runs} runs, {len(different)} files differ", flush=True)
            shutil.rmtree(broken)
    record = {
        **facts, "kills": done, "runs finished": runs, "tables each": len(expected),
        "tables that differ": len(different), "which": different[:20],
    }  # fmt: skip
    file = ROOT / "benchmarks" / "results" / "trust-kills-cpu.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
