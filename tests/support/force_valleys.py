"""Valleys whose drift is known: the loss of example e at (w, y) is

    1/2 sum_i (g_i exp(slope_i y) + bend eta_e) w_i^2 + exp(rise y) xi_e . w + tilt y,

with xi of mean 0 and covariance diag(noise) over the examples, and eta of mean 0 and variance 1,
independent of xi. The path is w = 0, from y = 0 to y = 1 (or longer).
"""

import torch
from torch import nn

from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path


class Valley(nn.Module):
    def __init__(self, stiffness, slopes, tilt, rise, bend):
        super().__init__()
        self.register_buffer("g", torch.as_tensor(stiffness, dtype=torch.float64))
        self.register_buffer("slopes", torch.as_tensor(slopes, dtype=torch.float64))
        self.tilt, self.rise, self.bend = tilt, rise, bend
        self.w = nn.Parameter(torch.zeros(len(self.g), dtype=torch.float64))
        self.y = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, batch):  # [B, r + 1] -> [B]
        xi, eta = batch[:, :-1], batch[:, -1]
        g = self.g * torch.exp(self.slopes * self.y)
        squares = 0.5 * (g + self.bend * eta[:, None]) * self.w.square()
        noise = torch.exp(self.rise * self.y) * (xi @ self.w)
        return squares.sum(1) + noise + self.tilt * self.y


def valley(
    stiffness=(10.0,) * 8,
    slopes=(-0.5,) * 8,
    noise=(1.0,) * 8,
    *,
    examples=2048,
    tilt=0.0,
    rise=0.0,
    bend=0.0,
    length=1.0,
    seed=0,
):
    """The objective and the path, in float64."""
    r = len(stiffness)
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(examples // 2, r, generator=g, dtype=torch.float64)
    half = half - half.mean(0)
    half = half @ torch.linalg.inv(torch.linalg.cholesky(half.T @ half / len(half))).T
    half = half * torch.as_tensor(noise, dtype=torch.float64).sqrt()
    eta = torch.ones(len(half), 1, dtype=torch.float64)
    data = torch.cat([torch.cat([half, eta], 1), torch.cat([half, -eta], 1)])
    model = Valley(stiffness, slopes, tilt, rise, bend)
    obj = Objective(model, lambda outputs, _: outputs, (data, torch.zeros(len(data))))
    ends = torch.zeros(2, r + 1, dtype=torch.float64)
    ends[1, -1] = length
    return obj, linear_path(*ends)
