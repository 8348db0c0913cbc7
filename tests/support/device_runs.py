"""Runs of the command line on a device against those on the CPU; see device_checks.py."""

from __future__ import annotations

import csv
import math
import shlex
from pathlib import Path

import torch
from conftest import TINY, entropic_fast
from safetensors.torch import save_file
from torch import nn

# Of the tiny run: what still makes every stage do something.
SMALLEST = """
data.train_limit=96 data.test_limit=32 data.curvature_examples=16
train.epochs=2
path.pivots=3 path.max_pivots=4 path.steps=[2] path.lrs=[0.1] path.dense_points=5
curvature.tol=0.01 curvature.spectrum_examples=16 curvature.spectrum_points=3
relax.steps=16 relax.batch_sizes=[8] relax.lrs=[0.03] relax.cycles=[15]
relax.optimizers=["adam"]
force.positions=2 force.directions=1 force.cycles=[1,2]
lmc.epochs=2 lmc.branch_epochs=[1] lmc.seeds=[0] lmc.points=3
fig6.branch_epochs=[1] fig6.points=3
fig7.seeds=[]
straight_line.steps=15 straight_line.batch_sizes=[4]
bad_minimum.corrupted_labels=16 bad_minimum.epochs=1 bad_minimum.steps=15 bad_minimum.starts=[0.5]
langevin.particles=100 langevin.steps=50
"""
STAGES = (
    "langevin",
    "train",
    "path",
    "curvature",
    "relax",
    "force",
    "lmc",
    "straight-line",
    "bad-minimum",
)
# How far iterations got, which rounding decides and how often a GPU is asked, and traces by two
# probes of what is left beside the directions that they found.
ITERATED = {"residual", "top_eigenvalue_residual", "predicted_error", "products", "forms"}
ITERATED |= {"hessian_trace", "hessian_trace_std_error"}
# Of a column's largest number. Eigenvalues are as near as the run's tolerance asks for.
TOLERANCE = 1e-4
LOOSE = {"force": 0.05, "fig6": 0.02, "profile.csv": 0.02, "curvature.csv": 0.02}


def run(out: Path, device: str, *stages: str) -> None:
    """Stages of the smallest run there is, one after another."""
    chosen = {line.split("=")[0]: line for line in [*TINY, *SMALLEST.split()]}
    words = [word for line in chosen.values() for word in ("--set", line)]
    for stage in stages:
        ended = entropic_fast(stage, "--out", out, "--workers", 1, "--device", device, *words)
        assert ended.code == 0, f"{stage}: {ended.err}"


def profile(out: Path, code: Path, device: str, seeds: tuple[int, ...]) -> None:
    """`entropic-fast profile` of a network with batch normalization, at one point or at two."""
    code.write_text(PROFILED)
    weights: list[object] = []
    for seed in seeds:
        file = code.with_name(f"{seed}.safetensors")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save_file(network().state_dict(), str(file))
        weights += ["--weights", file]
    given = [f"{code}:build", "--data", f"{code}:data", *weights, *FEW]
    ended = entropic_fast("profile", *given, "--out", out, "--device", device)
    assert ended.code == 0, ended.err


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


PROFILED = """
import torch
from device_runs import network as build

def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.arange(16) % 3
"""
FEW = shlex.split(
    "--points 3 --probes 2 --tol 0.01 --replicas 2 --steps 15 --lr 0.02 --path-steps 4 --pivots 3"
    " --density-probes 1 --density-steps 2 --eigenvalues 1"
)


def assert_tables_agree(found: Path, expected: Path, slack: float = 1.0) -> None:
    """Every number of every table, but for how far iterations got; `slack` times as loosely."""
    names = sorted(p.relative_to(expected) for p in expected.rglob("*.csv"))
    assert names == sorted(p.relative_to(found) for p in found.rglob("*.csv"))
    wrong = []
    for name in names:
        here, there = (
            list(csv.DictReader((folder / name).read_text().splitlines()))
            for folder in (found, expected)
        )
        assert len(here) == len(there) and here[0].keys() == there[0].keys(), name
        tolerance = next((t for part, t in LOOSE.items() if part in name.parts), TOLERANCE)
        for column in there[0].keys() - ITERATED:
            gap = _gap([r[column] for r in here], [r[column] for r in there])
            if not gap <= slack * tolerance:
                wrong.append(f"{name} {column}: {gap:.2g}")
    assert not wrong, "\n".join(wrong)


def _gap(found: list[str], expected: list[str]) -> float:
    """Largest difference over the largest number; 0 for the same words, infinite for others."""
    try:
        pairs = [(float(a), float(b)) for a, b in zip(found, expected, strict=True)]
    except ValueError:
        return 0.0 if found == expected else math.inf
    if any(math.isfinite(a) != math.isfinite(b) for a, b in pairs):
        return math.inf
    scale = max((abs(b) for _, b in pairs if math.isfinite(b)), default=0.0)
    gap = max((abs(a - b) for a, b in pairs if math.isfinite(b)), default=0.0)
    return gap / scale if scale else gap
