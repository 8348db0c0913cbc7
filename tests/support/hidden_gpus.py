"""GPUs are hidden from tests that did not ask for them.

A command without --device moves to the GPU by itself, and two processes on one GPU cannot meet by
NCCL: on a machine with a GPU both would fail for reasons that no test is about.
"""

from __future__ import annotations

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # for the environment, before torch first looks


def asks_for_gpus(expression: str) -> bool:
    """Whether pytest's -m selects tests marked gpu."""
    return "gpu" in expression.replace("not gpu", "")
