"""An entropic force without any energy: Langevin particles on a ring of equal minima.

The potential is zero on the whole circle, but stiffer on one side. At T > 0 the particles gather
where it is flat, as the analytic density says; V_eff = (T / 2) ln g is its leading order.
"""

import math

import torch

import entropic_fast as ef


def main(particles: int = 20_000, steps: int = 4_000, temperature: float = 0.25) -> float:
    ring = ef.RingPotential(stiffness=20.0, contrast=0.8)
    angle = 2 * math.pi * torch.rand(particles, generator=torch.Generator().manual_seed(0))
    run = ef.simulate_langevin(
        ring, ring.on_ring(angle), ef.LangevinIntegrator(temperature, 0.006), steps
    )

    bins = 12
    final = torch.atan2(run.final[:, 1], run.final[:, 0]).double()
    count = torch.histc(final, bins, -math.pi, math.pi)
    edges = torch.linspace(-math.pi, math.pi, bins + 1, dtype=torch.float64)
    middle, width = (edges[:-1] + edges[1:]) / 2, 2 * math.pi / bins
    fine = edges[:-1, None] + width * (torch.arange(50) + 0.5) / 50
    expected = particles * width * ring.analytic_density(temperature, fine).mean(1)

    print("angle  stiffness  simulated  analytic")
    for row in torch.stack((middle, ring.stiffness(middle), count, expected), 1).tolist():
        print("{:5.2f}  {:9.1f}  {:9.0f}  {:8.0f}".format(*row))
    chi_square = float(((count - expected) ** 2 / expected).sum())
    print(f"chi-square {chi_square:.1f} on {bins - 1} degrees of freedom")
    return chi_square


if __name__ == "__main__":
    main()
