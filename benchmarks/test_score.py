"""The score engine beside torch.func and its peers, its growth with E and P, and its kernels.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_scores.py
At full size, each part alone, a few minutes each; results go to benchmarks/results/score-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_scores.py -k norms
    (-k norms, spectrum_resnet, spectrum_wide, memory, growth or kernels)
ENTROPIC_FAST_BENCH_DEVICE=cuda runs it on a GPU. Peers that are not installed are named in the
record: pip install backpack-for-pytorch curvlinops-for-pytorch hessian-eigenthings==1.0.0a5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import Problem, importable, missing, products, spectra
from rounds import (
    DEVICE,
    FULL,
    Rounds,
    calls_for,
    difference,
    peak_in_subprocess,
    store,
    table,
    take_turns,
)
from score_kernels import Kernel, convolutions, grams, norms, on, yardsticks

import entropic_fast as ef
from entropic_fast.ops import backend

GIB = 2**30
# Peers warn of hooks, deprecations and optional parts.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]
PLAIN, PLAIN_LAST = "plain gradient", "plain gradient, channels last"
MM = "torch.mm float32"


# -- 1. norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "wrn16-4"] if FULL else ["resnet8", "wrn10-1"])
def test_norms(name: str, provenance: dict[str, Any], tmp_path: Path) -> None:
    """Squared norms of per-example gradients, in units of one plain gradient of the batch."""
    if FULL:
        problem = Problem(name, 128 if name == "resnet20" else 64)
    else:
        problem = Problem(name, 5, size=8)
    rivals = {
        PLAIN: problem.plain,
        PLAIN_LAST: problem.plain_channels_last,
        "ours": lambda: ef.gradient_norms(problem.objective),
        "vmap(grad)": problem.vmap_norms,
    }
    if importable("BackPACK"):
        rivals["BackPACK BatchL2Grad"] = problem.backpack_norms
    rounds = take_turns(rivals, 21 if FULL else 1, warm_up=FULL, limit=150)
    for other in rounds.values.keys() - {PLAIN, PLAIN_LAST, "ours"}:
        assert difference(rounds.values["ours"], rounds.values[other]) < 1e-3, other
    units = {
        "plain gradients": rounds.median(PLAIN),
        "plain gradients, channels last": rounds.median(PLAIN_LAST),
    }
    record = {**problem.facts(provenance), **table(rounds, **units)}
    store(f"score-norms-{name}", record, tmp_path)
    assert rounds.seconds["ours"] and "vmap(grad)" in rounds.values


# -- 2. and 3. spectra ---------------------------------------------------------------------


def product_rate(edge: int, columns: int) -> tuple[Any, float]:
    """A float32 matrix product of the Gram matrix's shape, and its operations."""
    rows = torch.randn(edge, columns, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return (lambda: rows @ rows.T), 2.0 * edge * edge * columns


def floor_of(problem: Problem, rounds: Rounds, operations: float) -> dict[str, float]:
    """One plain gradient pass (the faster layout) and E^2 P operations at torch.mm's rate."""
    rate = operations / rounds.median(MM)
    update = problem.examples**2 * problem.parameters / rate
    plain = min(rounds.median(PLAIN), rounds.median(PLAIN_LAST))
    return {
        "plain gradient pass, faster layout": plain,
        "plain gradient pass, default layout": rounds.median(PLAIN),
        "torch.mm operations per second": rate,
        "E^2 P operations": update,
        "floor": plain + update,
        "floor, default layout": rounds.median(PLAIN) + update,
    }


def spectrum_record(
    problem: Problem, rounds: Rounds, operations: float, provenance: dict[str, Any]
) -> dict[str, Any]:
    parts = floor_of(problem, rounds, operations)
    units = {
        "floors": parts["floor"],
        "floors, default layout": parts["floor, default layout"],
        "plain gradients": parts["plain gradient pass, default layout"],
    }
    return {**problem.facts(provenance), "floor": parts, **table(rounds, **units)}


def test_spectrum_resnet(provenance: dict[str, Any], tmp_path: Path) -> None:
    """E = 1024 scores of ResNet-20: every way to the whole spectrum, and the floor.

    curvlinops and hessian-eigenthings have products with the matrix only: one is timed.
    """
    problem = Problem("resnet20", 1024) if FULL else Problem("resnet8", 6, size=8)
    product, operations = product_rate(problem.examples, min(problem.parameters, 65_536))
    whole = spectra(problem)
    rivals = {
        PLAIN: problem.plain,
        PLAIN_LAST: problem.plain_channels_last,
        MM: product,
        **whole,
        **products(problem),
    }
    # These take many times as long as the others.
    slow = {"vmap(grad) + svdvals": 1, "BackPACK BatchGrad + Gram": 2}
    slow |= dict.fromkeys(products(problem), 1)
    if FULL:
        take_turns({n: r for n, r in rivals.items() if n not in slow}, 1, warm_up=False)
    rounds = take_turns(rivals, 5 if FULL else 1, most=slow, warm_up=False, limit=200, large=True)
    for name in whole:
        if name in rounds.values:
            assert difference(rounds.values[name], rounds.values["ours"]) < 1e-3, name
    directions = [rounds.values[n] for n in products(problem) if n in rounds.values]
    for other in directions[1:]:
        assert difference(directions[0], other) < 1e-2
    store(
        "score-spectrum-resnet20",
        spectrum_record(problem, rounds, operations, provenance),
        tmp_path,
    )


def test_spectrum_wide(provenance: dict[str, Any], tmp_path: Path) -> None:
    """E = 1024 scores of WRN-16-4 within 8 GiB; vmap(grad) only where its 11.3 GB fit."""
    problem = Problem("wrn16-4", 1024) if FULL else Problem("wrn10-1", 6, size=8)
    product, operations = product_rate(problem.examples, min(problem.parameters, 65_536))
    ways = spectra(problem, memory_budget=8 * GIB)
    rivals = {PLAIN: problem.plain, PLAIN_LAST: problem.plain_channels_last, MM: product}
    rivals |= {n: way for n, way in ways.items() if n.startswith("ours")}
    rivals["vmap(grad) + Gram"] = ways["vmap(grad) + Gram"]
    most = {"vmap(grad) + Gram": 1 if matrix_fits(problem) else 0, PLAIN: 2}
    rounds = take_turns(rivals, 3 if FULL else 1, most=most, warm_up=False, limit=240, large=True)
    for name in rounds.values.keys() & ways.keys():
        assert difference(rounds.values[name], rounds.values["ours"]) < 1e-3, name
    record = spectrum_record(problem, rounds, operations, provenance)
    record["vmap(grad) + Gram fits"] = matrix_fits(problem)
    store("score-spectrum-wrn16-4", record, tmp_path)


def matrix_fits(problem: Problem) -> bool:
    """Whether the score matrix and a chunk of gradients fit with a fifth to spare."""
    from entropic_fast._torch.memory_budget import available_bytes

    needed = 4 * problem.parameters * (problem.examples + 3 * 32)
    return 1.2 * needed < available_bytes(torch.device(DEVICE))


def test_memory(provenance: dict[str, Any], tmp_path: Path) -> None:
    """Peak memory above the data and the model, each way in a process of its own."""
    networks = [("resnet20", 1024, 32, None), ("wrn16-4", 1024, 32, 8 * GIB)]
    record: dict[str, Any] = {**provenance, "device": DEVICE, "peers not installed": missing()}
    for name, examples, size, budget in networks if FULL else [("resnet8", 6, 8, GIB)]:
        small = Problem(name, 2, size)
        ways = [PLAIN, *spectra(small), *products(small)] if FULL else [PLAIN, "ours"]
        if budget is not None and FULL:
            ways = [way for way in ways if way == PLAIN or way.startswith("ours")]
        peaks = {
            way: peak_in_subprocess(way, name, examples, size, *([budget] if budget else []))
            for way in ways
        }
        record[name] = {"examples": examples, "budget": budget, "peak bytes": peaks}
        ours = peaks["ours"]
        assert "failed" not in ours, ours
        if budget is not None:
            assert ours["peak"] <= 1.15 * budget
    store("score-memory", record, tmp_path)


# -- 4. growth -----------------------------------------------------------------------------


def test_growth(provenance: dict[str, Any], tmp_path: Path) -> None:
    """Seconds against E at a fixed network, and against P (its width) at fixed E."""
    counts = (64, 128, 256, 512, 1024) if FULL else (2, 4)
    widths = (8, 16, 32, 64) if FULL else (4, 8)
    fixed = 128 if FULL else 4
    name, size = ("resnet20", 32) if FULL else ("resnet8", 8)
    record: dict[str, Any] = {**provenance, "device": DEVICE, "examples": [], "parameters": []}
    cells = [("examples", f"{name}", e) for e in counts]
    cells += [("parameters", f"{name}-w{w}", fixed) for w in widths]
    for axis, network, examples in cells:
        problem = Problem(network, examples, size)
        rivals = {
            PLAIN: problem.plain,
            "ours": problem.ours,
            "vmap(grad) + Gram": problem.vmap_gram,
        }
        rounds = take_turns(rivals, 3 if FULL else 1, warm_up=FULL, limit=40, large=True)
        assert difference(rounds.values["vmap(grad) + Gram"], rounds.values["ours"]) < 1e-3
        record[axis].append({**problem.facts({}), **table(rounds)})
        del problem, rivals, rounds
    path = store("score-growth", record, tmp_path)
    if not FULL:
        from plot_score import draw

        assert draw(path).stat().st_size > 1000


# -- 5. kernels ----------------------------------------------------------------------------


def test_kernels(provenance: dict[str, Any], tmp_path: Path) -> None:
    """Every kernel's time, operations and bytes, and the share of the limit that it reaches."""
    kernels = [*yardsticks(), *convolutions(), *grams(), *norms()]
    rivals: dict[str, Any] = {}
    of: dict[str, tuple[Kernel, str]] = {}
    for kernel in kernels:
        ours = kernel.family in backend.families()
        auto = backend.backend_for(kernel.family, DEVICE) if ours else "torch"
        for name in [auto] + ["reference"] * (ours and auto != "reference"):
            label = f"{kernel.name} [{name}]"
            rivals[label] = on(name if name == "reference" else None, kernel)
            of[label] = (kernel, name)
    # Some 30 ms a turn, so that threads and caches are warm; few turns for what is slow.
    repeats = {label: calls_for(rival, 0.03 if FULL else 0) for label, rival in rivals.items()}
    slow = {label: 3 for label, (_, name) in of.items() if name == "reference"}
    rounds = take_turns(rivals, 15 if FULL else 1, most=slow, warm_up=False, repeats=repeats)
    assert not rounds.failed
    peak: dict[torch.dtype, float] = {}
    bandwidth = 0.0
    for label, (kernel, _) in of.items():
        if kernel.family == "peak":
            rate = kernel.operations / min(rounds.seconds[label])
            peak[kernel.dtype] = max(rate, peak.get(kernel.dtype, 0.0))
        elif kernel.family == "bandwidth":
            bandwidth = kernel.bytes / min(rounds.seconds[label])
    if DEVICE == "cpu":  # vectors hold half as many; torch.mm does not always use the widest
        peak[torch.float64] = max(peak[torch.float64], peak[torch.float32] / 2)
    rows, summary = [], rounds.summary()
    for label, (kernel, name) in of.items():
        limit = max(kernel.operations / peak[kernel.dtype], kernel.bytes / bandwidth)
        seconds = summary[label]["median"]
        rows.append(
            {
                "kernel": kernel.name,
                "family": kernel.family,
                "backend": name,
                **summary[label],
                "operations": kernel.operations,
                "bytes": kernel.bytes,
                "operations per second": kernel.operations / seconds,
                "limit": limit,
                "bound by": "bytes" if limit * bandwidth == kernel.bytes else "operations",
                "share of the limit": limit / seconds,
            }
        )
    record = {
        **provenance,
        "device": DEVICE,
        "peak operations per second": {str(k)[6:]: v for k, v in peak.items()},
        "copy bytes per second": bandwidth,
        "kernels": rows,
    }
    store("score-kernels", record, tmp_path)
    assert all(row["median"] > 0 for row in rows)
