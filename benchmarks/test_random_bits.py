"""Random numbers in kernels against the same numbers by tensor arithmetic, and torch's own.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_random_bits.py
Eleven million numbers, stored in benchmarks/results/random-bits-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_random_bits.py

Ours and the reference draw the same bits; torch's generator is another, drawn in sequence: a number
of it depends on those before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import DEVICE, FULL, store, table, take_turns
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.random_bits import FAMILY, fill_
from entropic_fast.ops.random_bits import streams as random

NUMBERS = 11_000_000 if FULL else 20_000  # the parameters of ResNet-18
COLUMNS = 8  # probes at once
ROUNDS = 9 if FULL else 2


def signs(out: Tensor, setting: str | None) -> Callable[[], Tensor]:
    """Columns [P, K] of signs, a stream each."""
    return lambda: fill_(out.T[:, None], 0, kind="signs", backend=setting)


def torch_signs(out: Tensor) -> Callable[[], Tensor]:
    return lambda: out.bernoulli_().mul_(2).sub_(1)


def orders(seeds: Tensor, n: int, setting: str | None) -> Callable[[], Tensor]:
    def run() -> Tensor:
        backend.set_backend(setting)
        try:
            return random.permutations(n, seeds)
        finally:
            backend.set_backend(None)

    return run


def torch_orders(seeds: Tensor, n: int) -> Callable[[], Tensor]:
    return lambda: torch.stack([torch.randperm(n, device=seeds.device) for _ in seeds])


def work() -> dict[str, tuple[int, dict[str, Callable[[], Tensor]]]]:
    """What is drawn: how many numbers, and who draws them how."""
    one = torch.empty(NUMBERS, 1, device=DEVICE)
    block = torch.empty(NUMBERS // COLUMNS, COLUMNS, device=DEVICE)
    uniform = torch.empty(1, 1, NUMBERS, dtype=torch.float64, device=DEVICE)
    replicas, n = torch.arange(16, device=DEVICE), NUMBERS // 220
    return {
        "a column of signs, float32": (
            NUMBERS,
            {
                "ours": signs(one, None),
                "reference": signs(one, "reference"),
                "torch": torch_signs(one),
            },
        ),
        "eight columns of signs, float32": (
            block.numel(),
            {
                "ours": signs(block, None),
                "reference": signs(block, "reference"),
                "torch": torch_signs(block),
            },
        ),
        "uniform numbers, float64": (
            NUMBERS,
            {
                "ours": lambda: fill_(uniform, 0, kind="uniform"),
                "reference": lambda: fill_(uniform, 0, kind="uniform", backend="reference"),
                "torch": lambda: uniform.uniform_(),
            },
        ),
        "orders of the examples, 16 replicas": (
            16 * n,
            {
                "ours": orders(replicas, n, None),
                "reference": orders(replicas, n, "reference"),
                "torch": torch_orders(replicas, n),
            },
        ),
    }


def test_random_bits(provenance: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for name, (count, rivals) in work().items():
        rounds = take_turns(rivals, ROUNDS)
        for rival, seconds in rounds.seconds.items():
            rounds.seconds[rival] = [1e9 * s / count for s in seconds]
        assert torch.equal(rivals["ours"]().clone(), rivals["reference"]())
        ways = table(rounds)
        runs.append(
            {
                "what": name,
                "numbers": count,
                "ns a number": ways["seconds"],
                "failed": ways["failed"],
                "times as fast as the reference": rounds.median("reference")
                / rounds.median("ours"),
            }
        )
        assert not ways["failed"], ways["failed"]
    record = {
        **provenance,
        "device": DEVICE,
        "backend": backend.backend_for(FAMILY, DEVICE),
        "runs": runs,
    }
    store("random-bits", record, tmp_path)
