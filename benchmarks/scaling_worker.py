"""One of the processes that `test_scaling` times: strong or weak scaling of shared quantities.

torchrun --nproc-per-node W benchmarks/scaling_worker.py OUT EXAMPLES COLUMNS ROUNDS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import entropic_fast as ef
from entropic_fast.distributed import Communicator, init
from entropic_fast.experiments._costs import PASSES, measure, path_work, relaxation_work, work_of
from entropic_fast.training.models import build

STEPS = 3
WAITING = "gram, waiting for rows"  # what overlap saves is what this takes more than "gram"


def gram_without_overlap(obj: ef.Objective) -> torch.Tensor:
    """The Gram matrix, with nothing computed while rows are on their way."""
    exchange = Communicator.ring_exchange

    def at_once(*args: Any) -> Callable[[], torch.Tensor]:
        rows = exchange(*args)()
        return lambda: rows

    with patch.object(Communicator, "ring_exchange", at_once):
        return ef.score_gram(obj)


def main(out: str, examples: int, columns: int, rounds: int) -> None:
    torch.set_num_threads(1)
    init()
    torch.manual_seed(0)
    net = build("resnet20")
    batch = min(16, examples)
    pivots, replicas = (7, 4) if rounds > 1 else (3, 2)
    x, y = torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))
    obj = ef.distribute(ef.Objective(net, "cross_entropy", (x, y), batch_size=64))
    v = torch.randn(obj.num_params, columns, generator=torch.Generator().manual_seed(1))
    hessian = ef.HessianOperator(obj)
    path = ef.linear_path(obj.parameters_vector(), 1.01 * obj.parameters_vector())
    config = ef.AutoNEBConfig(
        pivots=pivots, max_pivots=pivots, cycles=((STEPS, 0.01),), batch_size=batch, eval_points=1
    )
    starts = [i / (replicas - 1) for i in range(replicas)]

    work: dict[str, Callable[[], Any]] = {
        "gradient": lambda: obj.gradient(),
        "products": lambda: hessian @ v,
        "forms": lambda: hessian.quadratic_forms(v),
        "norms": lambda: ef.gradient_norms(obj),
        "gram": lambda: ef.score_gram(obj),
        "path": lambda: ef.auto_neb(obj, path.pivots[0], path.pivots[-1], config),
        "relax": lambda: ef.relax(
            obj, path, starts, ef.ProjectedSGD(1e-3, batch, project_every=STEPS, steps=STEPS)
        ),
    }
    if obj.communicator.size > 1:
        work[WAITING] = lambda: gram_without_overlap(obj)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for action in work.values():
        action()
    for _ in range(rounds):
        for name, action in work.items():
            obj.communicator.check_consistent()
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    machine = measure(obj)
    processes = obj.communicator.size
    shape = dict(parameters=obj.num_params, processes=processes)
    updates = dict(batch_size=batch, steps=STEPS, **shape)
    # With one point between pivots the loss is taken at twice as many, after its statistics.
    points = -(-(2 * pivots - 1) // processes)
    dense = work_of("loss", examples=examples, parameters=obj.num_params).times(2 * points)
    expected = {
        "path": path_work(pivots=pivots, **updates) + dense,
        "relax": relaxation_work(replicas=replicas, **updates),
    }
    for name in work:
        quantity = name.split(",")[0]
        if quantity in PASSES:
            expected[name] = work_of(quantity, examples=examples, columns=columns, **shape)
    found = {
        "machine": asdict(machine),
        "quantities": {
            name: {
                "median": median(taken),
                "expected": expected[name].on(machine).seconds,
            }
            for name, taken in seconds.items()
        },
    }
    if not int(os.environ.get("RANK", 0)):
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
