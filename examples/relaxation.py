"""Relaxation along a path: where gradient noise drives a network, with confidence intervals.

Projected SGD starts part of the way along a minimum energy path, at two batch sizes. The batch of
all examples has no noise: what moves there is moved by the loss alone.
"""

from torch import nn

import entropic_fast as ef
from entropic_fast.dynamics import displacement
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import load


def main(epochs: int = 30, neb_steps: int = 60, steps: int = 300, replicas: int = 8) -> None:
    data, _ = load("digits", limit=512)
    config = TrainConfig(epochs=epochs, batch_size=32, augment=False)
    minima = []
    for seed in (0, 1):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        model = train(network, data, config, seed=seed).model
        minima.append(ef.Objective(model, "cross_entropy", data.tensors()))
    obj = minima[0]
    ends = [minimum.parameters_vector() for minimum in minima]
    settings = ef.AutoNEBConfig(pivots=7, cycles=[(neb_steps, 0.1), (neb_steps, 0.02)])
    path = ef.auto_neb(obj, *ends, settings).path

    start = float(path.positions[1:3].mean())  # between the second pivot and the third
    for batch_size in (4, len(data)):
        noise = batch_size < len(data)
        run = ef.relax(
            obj,
            path,
            start,
            ef.ProjectedSGD(0.5, batch_size, project_every=15, steps=steps),
            replicas=replicas if noise else 1,
        )
        moved = displacement(run) if noise else float(run.position[0, -1] - start)
        print(f"B = {batch_size}, from s = {start:.3f}: moved {moved}")


if __name__ == "__main__":
    main()
