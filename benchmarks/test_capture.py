"""A second objective of an architecture against the first, and against a plain gradient.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_capture.py
torchvision's ResNet-18, stored in benchmarks/results/hessian-second-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_capture.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from rounds import DEVICE, FULL, store, table, take_turns
from torch import nn

from entropic_fast import HessianOperator, Objective
from entropic_fast.objective._architecture_cache import forget

ROUNDS = 5 if FULL else 1
SIZE, EXAMPLES = (64, (8, 32)) if FULL else (8, (4,))


def network() -> nn.Module:
    if FULL:
        return torchvision.models.resnet18(num_classes=10).to(DEVICE)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).to(DEVICE)


def rivals(examples: int) -> dict[str, Callable[[], Any]]:
    """Each makes an objective of a new network ready for its first product."""
    x = torch.randn(examples, 3, SIZE, SIZE, device=DEVICE)
    y = torch.randint(10, (examples,), device=DEVICE)
    known = Objective(network(), "cross_entropy", (x, y))

    def ready() -> str:
        return HessianOperator(Objective(network(), "cross_entropy", (x, y))).method

    def first() -> str:
        forget()
        return ready()

    return {"first": first, "second": ready, "plain gradient": known.gradient}


def test_second_objective(provenance: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for examples in EXAMPLES:
        rounds = take_turns(rivals(examples), ROUNDS)  # "first" leaves its architecture known
        assert rounds.values["first"] == rounds.values["second"] == "graph"
        runs.append({"examples": examples, **table(rounds)})
    store("hessian-second-objective", {**provenance, "image": SIZE, "runs": runs}, tmp_path)
