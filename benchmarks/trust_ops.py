"""Thousands of random calls of every op against its oracle: how many were made, how many wrong.

    python benchmarks/trust_ops.py FIRST LAST

Calls of seeds FIRST .. LAST - 1 of every op, by the C++ kernels; counts go to
benchmarks/results/trust-ops-cpu.json.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(first: int, last: int) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from random_calls import OPS, disagreement

    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    wrong: dict[str, list[str]] = {}
    for name in OPS:
        found = ((seed, disagreement(name, seed, "cpp")) for seed in range(first, last))
        wrong[name] = [f"seed {seed}: {what}" for seed, what in found if what]
        print(f"{name}: {len(wrong[name])} wrong {wrong[name][:3]}", flush=True)
    record = {
        **facts,
        "seeds": [first, last],
        "ops": len(OPS),
        "calls": len(OPS) * (last - first),
        "wrong": sum(map(len, wrong.values())),
        "which": {name: found[:20] for name, found in wrong.items() if found},
    }
    file = ROOT / "benchmarks" / "results" / "trust-ops-cpu.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
