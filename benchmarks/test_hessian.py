"""The Hessian engine beside torch.func, double backward and its peers.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_hessian.py
At full size, each part alone; results go to benchmarks/results/hessian-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_hessian.py -k products_resnet
    (-k products_resnet, products_wide, probes_resnet18, trace, line or path)
ENTROPIC_FAST_BENCH_COMPILE=1 adds `torch.compile` of jvp(grad), which takes minutes to compile.
Other settings and the peers are those of test_scores.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hessian_peers import (
    Hessians,
    digits,
    operator,
    power_iteration,
    random_vector,
    settled,
    trained,
)
from peers import Problem, importable
from rounds import FULL, difference, store, synchronize, table, take_turns
from torch import Tensor, nn
from torchvision.models import resnet18

import entropic_fast as ef
from entropic_fast.curvature import (
    HessianOperator,
    autograd_only,
    hessian_trace,
    top_eigenvalues,
    tracked_eigenpairs,
)

# Peers warn of hooks, deprecations and optional parts.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(2400)]
COMPILE = os.environ.get("ENTROPIC_FAST_BENCH_COMPILE") == "1"
PLAIN, PLAIN_LAST = "plain gradient", "plain gradient, channels last"
# Trace estimators of libraries; of PyHessian's way, and what torch leaves to write: Hutchinson's.
OFFERED = {
    "curvlinops": ("Hutchinson", "Hutch++", "XTrace"),
    "hessian-eigenthings": ("Hutchinson", "Hutch++"),
    "": ("Hutchinson",),
}
BLOCK, BLOCKS = 8, ("vmap(jvp(grad))", "curvlinops")


def products_record(
    problem: Problem, rounds: int, provenance: dict[str, Any], blocks: Collection[str] = BLOCKS
) -> dict[str, Any]:
    """Products and trace probes, each in units of one plain gradient.

    Args:
        blocks: peers that are to make 8 products at once too.
    """
    hessians = Hessians(problem)
    one, block = hessians.vectors(1), hessians.vectors(BLOCK)
    fixed, single = operator(problem), operator(problem)
    for _ in range(3):  # values at the point are kept from the second call
        fixed @ block, single @ one
    # name: (what to run, products or probes it makes)
    rivals: dict[str, tuple[Any, int]] = {
        PLAIN: (problem.plain, 1),
        PLAIN_LAST: (problem.plain_channels_last, 1),
        "ours, 8 probes": (lambda: operator(problem).quadratic_forms(block), BLOCK),
        "ours, 8 products": (lambda: operator(problem) @ block, BLOCK),
        "ours, 8 products at a fixed point": (lambda: fixed @ block, BLOCK),
        "ours, 1 product at a fixed point": (lambda: single @ one, 1),
        "ours, 1 product at a new point": (lambda: operator(problem) @ one, 1),
    }
    rivals |= {name: (way, 1) for name, way in hessians.peers(1, COMPILE).items()}
    many = hessians.peers(BLOCK, False)
    rivals |= {f"{name}, 8": (many[name], BLOCK) for name in many.keys() & set(blocks)}
    slow = {f"{name}, 8": 1 for name in blocks}  # they take longest and lose by most
    found = take_turns(
        {name: way for name, (way, _) in rivals.items()},
        rounds,
        most=slow,
        warm_up=FULL,
        limit=300,
    )
    # In float32 rounding turns some ReLUs of millions on or off, and each is worth some 1e-4 of a
    # product: no way comes nearer than that to the product in float64.
    double = problem.objective.double()
    exact = (HessianOperator(double) @ one.double()).reshape(-1)
    errors = {
        name: difference(value.reshape(len(exact), -1)[:, 0], exact)
        for name, value in found.values.items()
        if name not in (PLAIN, PLAIN_LAST, "ours, 8 probes")
    }
    with autograd_only():
        by_torch = (HessianOperator(double) @ one.double()).reshape(-1)
    assert difference(exact, by_torch) < 1e-10
    theirs = max(error for name, error in errors.items() if not name.startswith("ours"))
    assert all(error <= 4 * theirs for name, error in errors.items()), errors
    block_products = found.values["ours, 8 products"].double()
    forms = (block.double() * block_products).sum(0)
    assert difference(found.values["ours, 8 probes"], forms) < 1e-3
    for name, (_, count) in rivals.items():
        if name in found.seconds:
            found.seconds[name] = [s / count for s in found.seconds[name]]
    units = {
        "plain gradients": found.median(PLAIN),
        "plain gradients, channels last": found.median(PLAIN_LAST),
    }
    return {
        **problem.facts(provenance),
        "method": fixed.method,
        "error against float64": errors,
        **table(found, **units),
    }


def test_products_resnet(provenance: dict[str, Any], tmp_path: Path) -> None:
    problem = Problem("resnet20", 128) if FULL else Problem("resnet8", 5, size=8)
    record = products_record(problem, 15 if FULL else 1, provenance)
    store("hessian-products-resnet20", record, tmp_path)
    assert record["method"] == "graph"


def test_products_wide(provenance: dict[str, Any], tmp_path: Path) -> None:
    problem = Problem("wrn16-4", 64) if FULL else Problem("wrn10-1", 5, size=8)
    # Blocks of 8 take peers minutes and many gigabytes here, and longer than 8 single products.
    record = products_record(problem, 5 if FULL else 1, provenance, () if FULL else BLOCKS)
    store("hessian-products-wrn16-4", record, tmp_path)
    assert record["method"] == "graph"


def test_probes_resnet18(provenance: dict[str, Any], tmp_path: Path) -> None:
    """A trace by 8 probes whole, with the signs and a new operator, on torchvision's ResNet-18."""
    model = resnet18(num_classes=10)
    size, examples = (64, 32) if FULL else (32, 2)
    problem = Problem("torchvision resnet18", examples, size, model=model)
    hessians = Hessians(problem)
    loss = nn.CrossEntropyLoss()

    def one_probe(way: Callable[[Tensor], Tensor]) -> Tensor:
        v = torch.randint(0, 2, (problem.parameters,), device=problem.x.device) * 2.0 - 1.0
        return v @ way(v).reshape(-1)

    def curvlinops() -> Tensor:
        from curvlinops import HessianLinearOperator, hutchinson_trace

        parameters = list(problem.model.parameters())
        data = [(problem.x, problem.y)]
        return hutchinson_trace(
            HessianLinearOperator(problem.model, loss, parameters, data, check_deterministic=False),
            num_matvecs=1,
        )

    # name: (what to run, probes it makes)
    rivals: dict[str, tuple[Any, int]] = {
        PLAIN: (problem.plain, 1),
        PLAIN_LAST: (problem.plain_channels_last, 1),
        "ours, hessian_trace, 8 probes": (
            lambda: hessian_trace(problem.objective, probes=BLOCK),
            BLOCK,
        ),
        "double backward": (lambda: one_probe(hessians.double_backward), 1),
        "jvp(grad)": (lambda: one_probe(hessians.jvp_grad), 1),
    }
    if importable("curvlinops"):
        rivals["curvlinops"] = (curvlinops, 1)
    if importable("hessian-eigenthings"):
        rivals["hessian-eigenthings"] = (lambda: one_probe(hessians.eigenthings), 1)
    found = take_turns(
        {name: way for name, (way, _) in rivals.items()}, 9 if FULL else 1, warm_up=FULL, limit=240
    )
    for name, (_, count) in rivals.items():
        if name in found.seconds:
            found.seconds[name] = [s / count for s in found.seconds[name]]
    units = {
        "plain gradients": found.median(PLAIN),
        "plain gradients, channels last": found.median(PLAIN_LAST),
    }
    record = {**problem.facts(provenance), **table(found, **units)}
    store("hessian-probes-resnet18", record, tmp_path)
    assert found.values["ours, hessian_trace, 8 probes"].samples == BLOCK


def trained_problem(examples: int, seed: int = 0) -> Problem:
    """A trained ResNet on handwritten digits, as many of them as its objective has."""
    name, size, images, epochs = ("resnet20", 32, 1024, 24) if FULL else ("resnet8", 8, 64, 1)
    data = digits(size, images)
    model = trained(name, data, epochs, seed)
    return Problem(name, examples, size, data=data.tensors(examples), model=model)


def test_trace(provenance: dict[str, Any], tmp_path: Path) -> None:
    """The trace to 1 % standard error at a trained network, everything included.

    How many products an estimator takes to this error is found with ours: Hutch++ and XTrace by
    running them, Hutchinson's from the spread of a few samples. A peer's time is its product times
    the fewest products among the estimators that it offers; beside it stands what its product
    would take with the best estimator of all.
    """
    problem = trained_problem(256 if FULL else 5)
    tol, most, few = (0.01, 2000, 128) if FULL else (0.5, 64, 16)
    objective, hessians = problem.objective, Hessians(problem)
    rivals: dict[str, Any] = {
        PLAIN: problem.plain,
        "ours, Gauss-Newton part by gradients": lambda: hessian_trace(
            objective, None, most, tol, method="gauss-newton"
        ),
        "ours, deflated by 8": lambda: deflated(problem, 8 if FULL else 2, tol, most),
        "ours, Hutch++": lambda: hessian_trace(objective, None, most, tol, method="hutch++"),
        "ours, XTrace": lambda: hessian_trace(objective, None, most, tol, method="xtrace"),
    }
    peers = {f"{n}, one product": way for n, way in hessians.peers(1, COMPILE).items()}
    slow = {"ours, deflated by 8": 1, "ours, XTrace": 1}
    found = take_turns(rivals | peers, 3 if FULL else 1, most=slow, warm_up=False, limit=300)
    estimates = {n: e for n, e in found.values.items() if isinstance(e, ef.Estimate)}
    plain = hessian_trace(objective, probes=few)
    needed = {
        "Hutchinson": max(few, int(few * (plain.std_error / (tol * plain.value)) ** 2)),
        "Hutch++": estimates["ours, Hutch++"].matvecs,
        "XTrace": estimates["ours, XTrace"].matvecs,
    }
    for name, estimate in estimates.items():
        gap = abs(estimate.value - plain.value)
        assert gap < 5 * (estimate.std_error + plain.std_error), name
    record = {
        **problem.facts(provenance),
        "tol": tol,
        "products needed": needed,
        "estimates": {n: [e.value, e.std_error, e.matvecs] for n, e in estimates.items()},
        "peers in all": {
            n: found.median(n) * min(needed[e] for e in OFFERED.get(n.split(",")[0], OFFERED[""]))
            for n in peers
        },
        "with the best estimator": {n: found.median(n) * min(needed.values()) for n in peers},
        **table(found),
    }
    store("hessian-trace-resnet20", record, tmp_path)
    assert not FULL or all(e.std_error <= tol * abs(e.value) for e in estimates.values())


def deflated(problem: Problem, k: int, tol: float, most: int) -> ef.Estimate:
    """The trace with the part of the k largest eigenvalues computed exactly."""
    pairs = top_eigenvalues(operator(problem), k, tol=0.05)
    return hessian_trace(problem.objective, probes=most, tol=tol, deflate=pairs)


@pytest.mark.parametrize("kind", ["line", "path"])
def test_path(kind: str, provenance: dict[str, Any], tmp_path: Path) -> None:
    """The largest eigenvalue to a relative residual of 1e-3 at points of a path, in turns.

    Between two trained networks, along the straight line or a minimum energy path; normalization
    statistics are estimated anew at every point. Both ways start from what they found at the
    point before.
    """
    points, examples = (33, 64) if FULL else (3, 5)
    first, last = trained_problem(examples, 0), trained_problem(examples, 1)
    a, b = (p.objective.parameters_vector() for p in (first, last))
    path = ef.linear_path(a, b) if kind == "line" else minimum_energy_path(first, a, b)
    seconds: dict[str, list[float]] = {"ours": [], "power iteration by jvp(grad)": []}
    spent: dict[str, list[int]] = {name: [] for name in seconds}
    pairs, vector = None, random_vector(len(a)).to(a)
    for i in range(points):
        theta = path.point(i / (points - 1))
        problem = settled(first, theta)
        begin = time.perf_counter()
        pairs = tracked_eigenpairs(HessianOperator(problem.objective, theta), pairs, tol=1e-3)
        synchronize()
        seconds["ours"].append(time.perf_counter() - begin)
        spent["ours"].append(pairs.matvecs)
        begin = time.perf_counter()
        value, vector, count = power_iteration(Hessians(problem).jvp_grad, vector, 1e-3)
        synchronize()
        seconds["power iteration by jvp(grad)"].append(time.perf_counter() - begin)
        spent["power iteration by jvp(grad)"].append(count)
        # Power iteration finds the largest in magnitude.
        assert not FULL or value < 0 or abs(value - float(pairs.values[0])) < 0.01 * value
    record = {
        **first.facts(provenance),
        "points": points,
        "seconds": {name: sum(each) for name, each in seconds.items()},
        "products": {name: sum(each) for name, each in spent.items()},
        "seconds a point": seconds,
        "products a point": spent,
    }
    store(f"hessian-{kind}-resnet20", record, tmp_path)
    assert pairs is not None and pairs.converged


def minimum_energy_path(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> ef.Path:
    """From AutoNEB, on 512 digits."""
    images, steps = (512, 40) if FULL else (5, 1)
    data = digits(problem.size, images).tensors(images)
    objective = ef.Objective(problem.model, "cross_entropy", data)
    config = ef.AutoNEBConfig(
        pivots=5, max_pivots=7, cycles=[(steps, 0.1), (steps, 0.01)], batch_size=128, eval_points=1
    )
    return ef.auto_neb(objective, a, b, config).path
