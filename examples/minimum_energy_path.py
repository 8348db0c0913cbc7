"""A minimum energy path between two minima, and the curvature along it.

A small network on the digits is trained twice. The straight line between the two crosses a barrier;
AutoNEB finds a path of low loss, and `curvature_profile` measures it with errors.
"""

from torch import nn

import entropic_fast as ef
from entropic_fast.paths import annealed, barrier
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import load


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def main(epochs: int = 20, steps: int = 50, points: int = 5, probes: int = 32) -> None:
    data, _ = load("digits", limit=512)
    config = TrainConfig(epochs=epochs, batch_size=32, augment=False)
    obj, other = (
        ef.Objective(
            train(network(), data, config, seed=seed).model, "cross_entropy", data.tensors()
        )
        for seed in (0, 1)
    )
    a, b = obj.parameters_vector(), other.parameters_vector()
    line = ef.path_losses(obj, ef.linear_path(a, b), points=15)
    print(f"straight line: barrier {barrier(line).over_max:.4f} nats")

    settings = ef.AutoNEBConfig(pivots=7, cycles=annealed(3, steps, 0.1, 0.01), batch_size=128)
    found = ef.auto_neb(obj, a, b, settings)
    print(f"AutoNEB path:  barrier {barrier(found.losses).over_max:.4f} nats", end=", ")
    print(f"{found.path.num_pivots} pivots, length {found.path.length:.3g}")

    profile = ef.curvature_profile(
        obj, found.path, points, settings=ef.CurvatureSettings(probes=probes)
    )
    for row in profile.rows():
        print(
            "s = {s:.2f}: loss {loss:.4f}, Hessian trace {hessian_trace:.3g} ± "
            "{hessian_trace_std_error:.2g}, largest eigenvalue {top_eigenvalue:.3g}".format(**row)
        )


if __name__ == "__main__":
    main()
