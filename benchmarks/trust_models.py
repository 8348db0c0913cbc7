"""Thousands of random models against autograd in float64: how many were tried, how many wrong.

    python benchmarks/trust_models.py FIRST LAST [PROCESSES]
    python benchmarks/trust_models.py again
    python benchmarks/trust_models.py problems FIRST LAST [PROCESSES]
    python benchmarks/trust_models.py problems-again

Of every seed in FIRST .. LAST - 1: scores, Gram matrix, norms and Fisher trace against one backward
pass an example; Hessian and Gauss-Newton products and quadratic forms against two backward passes.
The counts go to benchmarks/results/trust-models-cpu.json after every few hundred seeds. A run that
was ended is gone on with from there: where the record ends at FIRST, its counts are added to.
Where the process ends (torch's own double backward crashes on some layers), it is started again
behind that seed, which is listed with its exit status. `again` checks the listed seeds anew, after
what they found is mended, and notes that beside the first counts.

`problems` draws batches, outputs, losses and derivatives of every kind around the models (see
`tests/support/random_problems.py`), compares with plain torch and central differences alone, and
writes trust-problems-cpu.json, with the refused quantities counted by the message.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILE = RESULTS / "trust-models-cpu.json"
CHUNK = 400  # seeds a process: starting one takes as long as a dozen of them
PROBLEMS_FILE, PROBLEMS_CHUNK = RESULTS / "trust-problems-cpu.json", 100


def check(first: int, last: int) -> None:
    """Check seeds in this process; a line before and after each."""
    import pytest
    import torch

    folders = ("support", "curvature/per_example", "curvature/hvp")
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in folders]
    import test_hvp_random_models as jets
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


def check_problems(first: int, last: int) -> None:
    """`check` of random problems; a line for every quantity that is refused."""
    import torch

    sys.path[:0] = [str(ROOT / "tests" / "support")]
    from plain_problems import WrongError, check
    from random_problems import random_problem

    torch.set_num_threads(1)
    for seed in range(first, last):
        print(f"begin {seed}", flush=True)
        kinds: frozenset[str] = frozenset()
        try:
            problem = random_problem(seed)
            kinds = problem.kinds
            refused = check(problem).refused
        except WrongError as error:
            print(f"wrong {seed} {' '.join(str(error).split())[:300]}; {sorted(kinds)}", flush=True)
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"failed {seed} {said}; {sorted(kinds)}", flush=True)
        else:
            for line in refused:
                print(f"reason {seed} {' '.join(line.split())}", flush=True)
            print(f"{'refused' if refused else 'right'} {seed}", flush=True)


def supervise(
    first: int, last: int, mode: str = "check"
) -> tuple[Counter[str], list[str], Counter[str]]:
    """Check seeds in processes of their own, whatever becomes of these."""
    counts, reasons = Counter[str](), Counter[str]()
    notes: list[str] = []
    while first < last:
        command = [sys.executable, "-W", "ignore", __file__, mode, str(first), str(last)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        begun = first - 1
        for line in ended.stdout.splitlines():
            word, seed, *rest = line.split(" ", 2)
            if word == "begin":
                begun = int(seed)
                continue
            if word == "reason":
                reasons[rest[0]] += 1
                continue
            counts[word] += 1
            if word not in ("right", "refused"):
                notes.append(f"{word} {seed}: {rest[0] if rest else ''}")
        if ended.returncode == 0:
            break
        counts["process ended"] += 1
        notes.append(f"process ended {begun}: exit status {ended.returncode}")
        first = max(begun, first) + 1
    return counts, notes, reasons


def main(first: int, last: int, processes: int = 2, *, problems: bool = False) -> None:
    file, chunk = (PROBLEMS_FILE, PROBLEMS_CHUNK) if problems else (FILE, CHUNK)
    mode = "check-problems" if problems else "check"
    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    begun, counts, notes, reasons = first, Counter[str](), [], Counter[str]()
    if file.exists() and (before := json.loads(file.read_text()))["seeds"][1] == first:
        begun, counts, notes = before["seeds"][0], Counter(before["counts"]), before["others"]
        reasons = Counter(before.get("refused by reason", {}))
        facts["earlier commits"] = [*before.get("earlier commits", []), before["commit"]]
    parts = [(i, min(i + chunk, last)) for i in range(first, last, chunk)]
    with ThreadPoolExecutor(processes) as pool:
        found_all = pool.map(lambda part: supervise(*part, mode), parts)
        for (_, end), (found, said, refused) in zip(parts, found_all, strict=True):
            counts += found
            notes += said
            reasons += refused
            print(f"{end} {dict(counts)} {said}", flush=True)
            record = {**facts, "seeds": [begun, end], "counts": dict(counts), "others": notes}
            if problems:
                record["refused by reason"] = dict(reasons.most_common())
            file.write_text(json.dumps(record, indent=1) + "\n")


def _seed(note: str) -> int:
    """Of a note such as "wrong 12: ..." or, of older records, "wrong 12 ..."."""
    found = re.search(r"\d+", note)
    assert found
    return int(found[0])


def again(file: Path = FILE, mode: str = "check") -> None:
    record = json.loads(file.read_text())
    commit = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()["commit"]
    counts, notes = Counter[str](), []
    for seed in sorted({_seed(note) for note in record["others"]}):
        found, said, _ = supervise(seed, seed + 1, mode)
        counts += found
        notes += said
    record["others again"] = {"commit": commit, "counts": dict(counts), "others": notes}
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "again":
        again()
    elif sys.argv[1] == "problems-again":
        again(PROBLEMS_FILE, "check-problems")
    elif sys.argv[1] == "check":
        check(*map(int, sys.argv[2:]))
    elif sys.argv[1] == "check-problems":
        check_problems(*map(int, sys.argv[2:]))
    elif sys.argv[1] == "problems":
        main(*map(int, sys.argv[2:]), problems=True)
    else:
        main(*map(int, sys.argv[1:]))
