"""Curvature on several processes: the same calls, with the examples shared among them.

    torchrun --nproc-per-node 2 examples/shared_curvature.py

One process alone (`python examples/shared_curvature.py`) prints the same numbers, up to rounding.
"""

import os

import torch

import entropic_fast as ef
from entropic_fast.distributed import init
from entropic_fast.experiments._costs import expected_cost, measure
from entropic_fast.training.data import load
from entropic_fast.training.models import build


def main(examples: int = 256, probes: int = 16) -> None:
    device = init()  # joins the others, if there are any
    torch.manual_seed(0)  # the same network on every process
    data, _ = load("digits", limit=examples)
    net = build("digits-cnn").to(device)
    obj = ef.distribute(ef.Objective(net, "cross_entropy", data.to(device).tensors()))
    processes = obj.communicator.size

    machine = measure(obj)
    shape = dict(examples=obj.num_examples, parameters=obj.num_params, processes=processes)
    price = expected_cost("gram", machine, **shape)

    trace = ef.hessian_trace(obj, probes=probes)
    pairs = ef.top_eigenvalues(ef.HessianOperator(obj), k=2)
    spectrum = ef.score_spectrum(obj)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{obj.num_examples} examples, {processes} processes")
        print(price)
        print(f"Hessian trace {trace}")
        for value, residual in zip(pairs.values, pairs.residuals, strict=True):
            print(f"eigenvalue {value:.6f}, residual {residual:.1e}")
        print(f"leading score eigenvalues {spectrum[0]:.6f}, {spectrum[1]:.6f}")


if __name__ == "__main__":
    main()
