"""Curvature of a trained network at its minimum.

Three traces with their standard errors, the largest eigenvalues of the Hessian with their
residuals, and its spectral density. The handwritten digits that ship with scikit-learn, a network
of 14,378 parameters.
"""

import torch

import entropic_fast as ef
from entropic_fast.training import TrainConfig, train
from entropic_fast.training.data import load
from entropic_fast.training.models import build


def main(epochs: int = 12, examples: int = 256, probes: int = 32, steps: int = 20) -> None:
    data, _ = load("digits")
    config = TrainConfig(epochs=epochs, batch_size=64, augment=False)
    model = train(build("digits-cnn"), data, config, seed=0).model

    obj = ef.Objective(model, "cross_entropy", data.tensors(examples))
    print(f"{obj.num_params} parameters, {obj.num_examples} examples, loss {obj.loss():.4f}")
    print("trace of the empirical Fisher matrix ", ef.fisher_trace(obj))
    print("trace of the Gauss-Newton matrix     ", ef.ggn_trace(obj))

    hessian = ef.HessianOperator(obj)
    top = ef.top_eigenvalues(hessian, k=4)
    for value, residual in zip(top.values.tolist(), top.residuals.tolist(), strict=True):
        print(f"eigenvalue {value:.4f}, residual {residual:.1e}")

    print("trace of the Hessian, random signs   ", ef.hessian_trace(obj, probes=probes))
    without = ef.hessian_trace(obj, probes=probes, deflate=top)
    print("the same, those eigenvalues exactly  ", without)

    density = ef.spectral_density(hessian, ef.DensitySettings(probes=4, steps=steps))
    print("the same, from the density           ", density.trace(lambda x: x))
    print("sum of the squared eigenvalues       ", density.trace(torch.square))


if __name__ == "__main__":
    main()
