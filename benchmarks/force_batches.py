"""What the force on a network with batch normalization owes to the batches it is taken on.

    python benchmarks/force_batches.py RUN DATA_DIR

Of a finished run of `small`, at the positions of its figure of the force: the noise of batches in
the order of the images, balanced over the classes, and in random ones; and the predicted velocity
with curvature from more and more images. Numbers go to benchmarks/results/force-batches-cpu.json.
"""

from __future__ import annotations

import json
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from entropic_fast.dynamics import ForceSettings
from entropic_fast.dynamics.force._gradient_noise import GradientNoise
from entropic_fast.dynamics.force._point_force import point_force
from entropic_fast.experiments import _inputs
from entropic_fast.experiments._run_folder import RunFolder
from entropic_fast.experiments.figures import force as fig_force
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits.streams import permutation
from entropic_fast.paths._path import Path as LossPath

ROOT = Path(__file__).parents[1]
EXAMPLES = (1024,)  # curvature from so many; the run itself has `force.examples`
ORDERS = 3


def position(folder: str, data_dir: str, index: int) -> dict[str, Any]:
    """Noise and predictions at one position, on one thread."""
    torch.set_num_threads(1)
    stored = RunFolder.open(folder)
    run = RunFolder(stored.path, stored.config, data_dir=data_dir)
    section, name = run.config[fig_force.Force], _inputs.path_names(run)[0][0]
    path = _inputs.load_path(run, name)
    obj = fig_force.dynamics_objective(run, run.config.path.pairs[0][0])
    s = fig_force.places(path.positions.tolist(), section.positions)[index]
    x, y = obj.tensors()
    orders = [permutation(len(x), seed) for seed in range(ORDERS)]
    found: dict[str, Any] = {
        "position": s,
        "noise, images in order": trace(obj, path, s),
        "noise, random batches": [
            trace(obj.with_data((x[i], y[i]), batch_size=section.batch_size), path, s)
            for i in orders
        ],
    }
    settings = fig_force.short_run_settings(run, max(section.cycles))
    for examples in EXAMPLES:
        point = point_force(
            obj,
            path,
            s,
            ForceSettings(
                directions=section.directions,
                complement_examples=section.rest_examples,
                heterogeneity_draws=section.spread_draws,
                step=section.step,
                tol=0.05,
                max_examples=examples,
            ),
            seed=run.config.seed,
        )
        velocity = point.entropic(settings)
        found[f"predicted, {examples} images"] = [velocity.value, velocity.std_error]
    return found


def trace(obj: Objective, path: LossPath, s: float) -> float:
    """tr C across the path, of the objective's batches in their order."""
    u = path.tangent(s)
    return float(GradientNoise(obj, path.point(s), u[:, None], u.new_empty(len(u), 0)).rest)


def main(folder: str, data_dir: str) -> None:
    facts = runpy.run_path(str(ROOT / "benchmarks" / "conftest.py"))["facts"]()
    count = RunFolder.open(folder).config[fig_force.Force].positions
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(partial(position, folder, data_dir), range(count)))
    file = ROOT / "benchmarks" / "results" / "force-batches-cpu.json"
    file.write_text(json.dumps({**facts, "positions": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
