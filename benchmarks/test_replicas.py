"""Many replicas of projected SGD beside a loop over replicas in eager PyTorch.

Small by default, so that it runs with the tests:
    pytest benchmarks/test_replicas.py
At full size, each part alone; results go to benchmarks/results/replicas-*.json:
    ENTROPIC_FAST_BENCH=full pytest benchmarks/test_replicas.py -k resnet
    (-k resnet or digits)
ENTROPIC_FAST_BENCH_DEVICE=cuda runs them on a GPU (64 replicas of ResNet-20 there). On a CPU the
target is 1.5 x the replica-updates a second of the eager loop on as many threads.

The eager loop is what one would write: a module in training mode for each replica,
`loss.backward()`, `torch.optim.SGD.step()`; projection is left out there, and counted in ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import DEVICE, FULL, store, synchronize, table, take_turns
from torch import Tensor, nn

from entropic_fast import Objective, linear_path, relax
from entropic_fast.dynamics import ProjectedSGD
from entropic_fast.dynamics.projected_sgd import _gradient_backends as backends
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.dynamics.projected_sgd._optimizers import Optimizer
from entropic_fast.dynamics.projected_sgd._replica_state import ReplicaState
from entropic_fast.training.models import build, initialize

pytestmark = [pytest.mark.timeout(1800)]
LR, BATCH, CYCLE = 0.01, 16, 15
EAGER = "eager loop"


class Problem:
    """A network, examples of noise, and a path to a point nearby."""

    def __init__(self, name: str, size: int, replicas: int) -> None:
        g = torch.Generator().manual_seed(0)
        channels = 1 if name.startswith("digits") else 3
        inputs = torch.randn(512, channels, size, size, generator=g)
        data = inputs, torch.randint(10, (512,), generator=g)
        self.model = initialize(build(name), seed=0).to(DEVICE)
        self.name, self.size, self.replicas = name, size, replicas
        obj = Objective(self.model, "cross_entropy", data)
        self.obj = obj.with_norm("batch") if obj.has_running_statistics else obj
        a = obj.parameters_vector()
        self.path = linear_path(a, a + 0.1 * torch.randn(len(a), generator=g).to(a), pivots=9)
        self.starts = torch.full((replicas,), 0.5, dtype=torch.float64)

    def facts(self, provenance: dict[str, Any]) -> dict[str, Any]:
        sizes = {"model": self.name, "size": self.size, "replicas": self.replicas, "batch": BATCH}
        return {**provenance, **sizes, "parameters": self.obj.num_params, "device": DEVICE}

    def eager(self) -> Callable[[], Tensor]:
        """One cycle of all replicas, one after the other."""
        point = self.path.point(0.5)
        models = []
        for _ in range(self.replicas):
            model = copy.deepcopy(self.model).train()
            nn.utils.vector_to_parameters(point, model.parameters())
            models.append((model, torch.optim.SGD(model.parameters(), LR)))
        minibatches = Minibatches(self.obj, BATCH, 0, range(self.replicas))
        inputs, targets = self.obj.tensors()

        def cycle() -> Tensor:
            for step in range(CYCLE):
                index = minibatches.indices(step)
                for r, (model, optimizer) in enumerate(models):
                    optimizer.zero_grad()
                    output = model(inputs[index[r]])
                    nn.functional.cross_entropy(output, targets[index[r]]).backward()
                    optimizer.step()
            rows = [nn.utils.parameters_to_vector(model.parameters()) for model, _ in models]
            with torch.no_grad():
                theta = self.path.project(torch.stack(rows))[1]
                for (model, _), row in zip(models, theta, strict=True):
                    for p, q in zip(model.parameters(), self.obj.split(row).values(), strict=True):
                        p.copy_(q)
            return theta

        return cycle

    def ours(self, engine: str) -> Callable[[], Tensor]:
        """One cycle of all replicas by an engine."""
        minibatches = Minibatches(self.obj, BATCH, 0, range(self.replicas))
        theta = self.path.point(self.starts).contiguous()
        _, gradients, _ = backends.choose(engine, self.obj, theta, *minibatches(0))
        rule = Optimizer(ProjectedSGD(LR, BATCH), torch.full_like(self.starts, LR).to(theta.device))
        run = ReplicaState(self.path, self.starts, rule, minibatches, gradients, 10.0)

        def cycle() -> Tensor:
            run.step = 0  # the same minibatches, as the eager loop has
            run.cycle(CYCLE)
            return run.theta

        return cycle

    def chosen(self) -> str:
        """The gradient backend that `relax` chooses."""
        sgd = ProjectedSGD(LR, BATCH, project_every=1, steps=1)
        return relax(self.obj, self.path, 0.5, sgd, replicas=self.replicas).backend

    def whole(self) -> Callable[[], Tensor]:
        """`relax` from start to end, a few cycles long; CUDA graphs included."""
        cycles = 40 if DEVICE != "cpu" else 4

        def run() -> Tensor:
            sgd = ProjectedSGD(LR, BATCH, steps=CYCLE * cycles, max_distance=10.0)
            return relax(self.obj, self.path, 0.5, sgd, replicas=self.replicas).position

        run.cycles = cycles  # type: ignore[attr-defined]
        return run


def record(problem: Problem, names: tuple[str, ...], rounds: int, provenance: Any) -> Any:
    """Seconds of one replica's update, and how many times as fast as the eager loop it is."""
    rivals: dict[str, Callable[[], Tensor]] = {EAGER: problem.eager()}
    rivals |= {f"ours, {name}": problem.ours(name) for name in names}
    whole = problem.whole()
    rivals["ours, relax"] = whole
    first = {name: rival().clone() for name, rival in rivals.items() if name != "ours, relax"}
    synchronize()
    for name, theta in first.items():  # a cycle from the same start on the same minibatches
        gap = (theta - first[EAGER]).norm() / (first[EAGER] - problem.path.pivots[0]).norm()
        assert float(gap) < 1e-2, name
    found = take_turns(rivals, rounds, limit=900)
    updates = CYCLE * problem.replicas
    for name, seconds in found.seconds.items():
        each = updates * (whole.cycles if name == "ours, relax" else 1)  # type: ignore[attr-defined]
        found.seconds[name] = [s / each for s in seconds]
    best = {name: min(seconds) for name, seconds in found.seconds.items()}
    return {
        **problem.facts(provenance),
        "chosen": problem.chosen(),
        "times as fast as the eager loop": {
            name: {"by medians": found.median(EAGER) / found.median(name),
                   "by the quickest rounds": best[EAGER] / best[name]}
            for name in found.seconds
        },
        **table(found),
    }  # fmt: skip


def test_resnet(provenance: dict[str, Any], tmp_path: Path) -> None:
    name, replicas = ("resnet20", 64) if DEVICE != "cpu" else ("resnet8", 16)
    problem = Problem(name, 32, replicas) if FULL else Problem("resnet8-w4", 8, 4)
    names = ("loop", "threads") if DEVICE == "cpu" else ("loop", "vmap")
    found = record(problem, names, 15 if FULL else 1, provenance)
    store(f"replicas-{name}", found, tmp_path)
    assert not found["failed"]


def test_digits(provenance: dict[str, Any], tmp_path: Path) -> None:
    """Networks so small that calls cost more than arithmetic, by number of replicas."""
    records = {}
    names = ("loop", "threads", "vmap") if DEVICE == "cpu" else ("loop", "vmap")
    for replicas in (2, 4, 8, 16, 32) if FULL else (3,):
        problem = Problem("digits-cnn-bn", 8, replicas)
        found = record(problem, names, 15 if FULL else 1, provenance)
        records[replicas] = {k: v for k, v in found.items() if k not in provenance}
    facts = {**provenance, "model": problem.name, "by replicas": records}
    store("replicas-digits", facts, tmp_path)
    assert not any(found["failed"] for found in records.values())
