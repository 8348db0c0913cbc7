"""Run folders from Python: what the command line does, in a few lines.

`reproduce` is `entropic-fast reproduce`: it computes what is missing and writes figures, claims and
report. `main` recomputes the claims of a run from its CSV files, which are all that a claim reads.
"""

import math
import sys
from pathlib import Path

from rich.console import Console

from entropic_fast.experiments import _pipeline as stages
from entropic_fast.experiments import claims
from entropic_fast.experiments._config import load_preset
from entropic_fast.experiments._run_folder import RunFolder

RECORDED = Path(__file__).parents[1] / "benchmarks" / "results" / "demo-cpu"


def reproduce(out: Path, preset: str = "demo", overrides: tuple[str, ...] = ()) -> None:
    run = RunFolder.create(out, load_preset(preset, overrides))
    console = Console(stderr=True)
    stages.execute_until(run, "report", None, console)
    stages.write_report(run, console)


def main(folder: Path = RECORDED) -> list[claims.Claim]:
    # A run keeps its tables in RUN/data; the recorded one has some of them, beside its claims.
    data = folder / "data"
    found = stages.evaluate_claims(data if data.is_dir() else folder)
    for claim in found:
        interval = f"[{claim.low:.3g}, {claim.high:.3g}]" if math.isfinite(claim.low) else ""
        print(f"{claim.figure:5}  {claim.name}: {claim.effect:.3g}", interval, claim.verdict)
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
