"""Peak memory of one way to a score spectrum: `python benchmarks/peak.py WAY MODEL E [BUDGET]`.

Run by `rounds.peak_in_subprocess`, in a process of its own; prints one line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch
from peers import Problem, products, spectra
from rounds import DEVICE, synchronize


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(way: str, model: str, examples: int, size: int, budget: int | None) -> None:
    options = {} if budget is None else {"memory_budget": budget}
    # Once with few examples, for what is loaded at first use; the objective of the large
    # problem and its data are not counted either.
    for count in (2, examples):
        problem = Problem(model, count, size)
        ways = {
            **spectra(problem, **(options if count == examples else {})),
            **products(problem),
            "plain gradient": problem.plain,
        }
        gc.collect()
        cuda = DEVICE.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before = status("VmRSS")
        begin = time.perf_counter()
        ways[way]()
        synchronize()
        seconds = time.perf_counter() - begin
        after = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    print(json.dumps({"peak": after - before, "before": before, "seconds": seconds}))


if __name__ == "__main__":
    name, network, count, pixels, *rest = sys.argv[1:]
    main(name, network, int(count), int(pixels), int(rest[0]) if rest else None)
