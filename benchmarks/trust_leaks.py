"""Memory left behind by a thousand products, Gram matrices and cycles of a run.

    python benchmarks/trust_leaks.py

Each in a process of its own (`tests/support/leaks.py`); goes to
benchmarks/results/trust-leaks-cpu.json.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ("batch norm gamma 0", "data-dependent branch", "attention", "tied weight")


def main() -> None:
    script = ROOT / "tests" / "support" / "leaks.py"
    sys.path.insert(0, str(script.parent))
    from leaks import CALLS, KINDS

    found = {}
    for kind in KINDS:
        for model in MODELS:
            command = [sys.executable, "-W", "ignore", str(script), kind, model]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            grown, tensors = map(int, output.split())
            found[f"{kind}, {model}"] = f"{grown:,} bytes, {tensors} tensors"
            print(kind, model, found[f"{kind}, {model}"], flush=True)
    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    file = ROOT / "benchmarks" / "results" / "trust-leaks-cpu.json"
    record = {**facts, "calls": CALLS, "left behind": found}
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
