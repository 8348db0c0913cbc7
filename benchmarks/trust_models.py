"""Thousands of random models against autograd in float64: how many were tried, how many wrong.

    python benchmarks/trust_models.py FIRST LAST [PROCESSES]
    python benchmarks/trust_models.py again

Of every seed in FIRST .. LAST - 1: scores, Gram matrix, norms and Fisher trace against one backward
pass an example; Hessian and Gauss-Newton products and quadratic forms against two backward passes.
The counts go to benchmarks/results/trust-models-cpu.json after every few hundred seeds. A run that
was ended is gone on with from there: where the record ends at FIRST, its counts are added to.
Where the process ends (torch's own double backward crashes on some layers), it is started again
behind that seed, which is listed with its exit status. `again` checks the listed seeds anew, after
what they found is mended, and notes that beside the first counts.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "trust-models-cpu.json"
CHUNK = 400  # seeds a process: starting one takes as long as a dozen of them


def check(first: int, last: int) -> None:
    """Check seeds in this process; a line before and after each."""
    import pytest
    import torch

    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "curvature")]
    import test_jets_random_models as jets
    import test_score_random_models as scores

    torch.set_num_threads(1)
    for seed in range(first, last):
        print(f"begin {seed}", flush=True)
        try:
            scores.test_everything_in_float64_is_that_of_single_backward_passes(seed)
            jets.test_products_and_forms_are_those_of_two_backward_passes(seed)
        except (AssertionError, pytest.fail.Exception) as error:  # the latter is no Exception
            print(f"wrong {seed} {' '.join(str(error).split())[:300]}", flush=True)
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"failed {seed} {said}", flush=True)
        else:
            print(f"right {seed}", flush=True)


def supervise(first: int, last: int) -> tuple[Counter[str], list[str]]:
    """Check seeds in processes of their own, whatever becomes of these."""
    counts: Counter[str] = Counter()
    notes: list[str] = []
    while first < last:
        command = [sys.executable, "-W", "ignore", __file__, "check", str(first), str(last)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        begun = first - 1
        for line in ended.stdout.splitlines():
            word, seed, *rest = line.split(" ", 2)
            if word == "begin":
                begun = int(seed)
                continue
            counts[word] += 1
            if word != "right":
                notes.append(f"{word} {seed}: {rest[0] if rest else ''}")
        if ended.returncode == 0:
            break
        counts["process ended"] += 1
        notes.append(f"process ended {begun}: exit status {ended.returncode}")
        first = max(begun, first) + 1
    return counts, notes


def main(first: int, last: int, processes: int = 2) -> None:
    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    begun, counts, notes = first, Counter[str](), []
    if FILE.exists() and (before := json.loads(FILE.read_text()))["seeds"][1] == first:
        begun, counts, notes = before["seeds"][0], Counter(before["counts"]), before["others"]
        facts["earlier commits"] = [*before.get("earlier commits", []), before["commit"]]
    parts = [(i, min(i + CHUNK, last)) for i in range(first, last, CHUNK)]
    with ThreadPoolExecutor(processes) as pool:
        found_all = pool.map(lambda part: supervise(*part), parts)
        for (_, end), (found, said) in zip(parts, found_all, strict=True):
            counts += found
            notes += said
            print(f"{end} {dict(counts)} {said}", flush=True)
            record = {**facts, "seeds": [begun, end], "counts": dict(counts), "others": notes}
            FILE.write_text(json.dumps(record, indent=1) + "\n")


def again() -> None:
    record = json.loads(FILE.read_text())
    commit = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()["commit"]
    counts, notes = Counter[str](), []
    for seed in sorted({int(note.split(":")[0].split()[-1]) for note in record["others"]}):
        found, said = supervise(seed, seed + 1)
        counts += found
        notes += said
    record["others again"] = {"commit": commit, "counts": dict(counts), "others": notes}
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "again":
        again()
    elif sys.argv[1] == "check":
        check(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
