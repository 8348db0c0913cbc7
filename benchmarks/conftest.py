"""Every benchmark record says what it was measured on: versions, commit, device, threads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from entropic_fast.selfcheck import collect


def commit() -> str:
    """The commit under test, marked "+changes" if the working tree differs from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    head = git("rev-parse", "HEAD") or "unknown"
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def facts() -> dict[str, Any]:
    """What a record was measured with."""
    found = collect()
    return {
        "commit": commit(),
        "versions": found["versions"],
        "isa": found["cpu"]["isa"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": [gpu["name"] for gpu in found["gpu"]],
    }


@pytest.fixture(scope="session")
def provenance() -> dict[str, Any]:
    """Facts to store in a record's `extra_info`."""
    return facts()
