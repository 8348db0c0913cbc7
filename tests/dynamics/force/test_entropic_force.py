"""Projected SGD in a quadratic valley drifts as theory says, and not where it says none.

Loss of example e at (w, y): 1/2 g(y) |w|^2 + xi_e . w, with g(y) = exp(slope y) g0 and noise
vectors xi_e of mean zero and unit covariance over the data. The mean loss is zero all along the
path w = 0: there is no energetic force on y, and minibatch noise of covariance 1/B acts on w only.
Within a cycle each component of w is an AR(1) process that starts at 0,

    E w_j^2 = (lr^2 / B) (1 - rho^(2 j)) / (1 - rho^2),   rho = 1 - lr g

(for batches much smaller than the data), and y moves by -lr 1/2 g'(y) |w|^2 an update: down the
stiffness, at a rate that follows from these, and tends to -(n T / 2) d ln g / dy with T = lr / 2B
where projection is rare and lr g small.
"""

import pytest
import torch
from relax_cases import relax_with
from torch import nn

from entropic_fast.dynamics import ProjectedSGD, displacement, drift, relax
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path

FAST, N, SLOPE, STIFF = 8, 2048, -0.5, 10.0


class Valley(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        self.w, self.y = nn.Parameter(torch.zeros(FAST)), nn.Parameter(torch.zeros(()))

    def forward(self, xi):  # [B, FAST] -> [B]
        g = STIFF * torch.exp(self.slope * self.y)
        return 0.5 * g * self.w.square().sum() + xi @ self.w


def valley(slope=SLOPE):
    """The objective and the path from y = 0 to y = 1, in float64."""
    g = torch.Generator().manual_seed(0)
    xi = torch.randn(N, FAST, generator=g, dtype=torch.float64)
    xi = xi - xi.mean(0)
    xi = xi @ torch.linalg.inv(torch.linalg.cholesky(xi.T @ xi / N)).T  # unit covariance
    obj = Objective(Valley(slope).double(), lambda outputs, _: outputs, (xi, torch.zeros(N)))
    ends = torch.zeros(2, FAST + 1, dtype=torch.float64)
    ends[1, -1] = 1.0
    return obj, linear_path(*ends)


def predicted_velocity(y, lr, batch_size, k):
    """Drift in effective time at y [...]: the mean over a cycle of -1/2 g' |w|^2.

    Batches drawn without replacement have covariance -1 / (N - 1) with each other in an epoch,
    and variance (N - B) / (N - 1) / B each.
    """
    g = STIFF * torch.exp(SLOPE * y)
    rho = 1 - lr * g
    mean_square = torch.zeros_like(y)
    for j in range(k):
        weights = torch.stack([rho**i for i in range(j)] or [torch.zeros_like(y)])
        squares, pairs = weights.square().sum(0), weights.sum(0).square()
        variance = (N - batch_size) / (N - 1) / batch_size
        mean_square += lr**2 * (squares * variance - (pairs - squares) / (N - 1)) / k
    return -0.5 * SLOPE * g * FAST * mean_square


@pytest.mark.parametrize(
    ("lr", "batch_size", "k"),
    [
        (0.02, 4, 15),
        (0.04, 4, 15),
        (0.02, 8, 15),
        (0.02, 4, 5),
    ],
)
def test_drift_is_the_predicted_one(lr, batch_size, k):
    obj, path = valley()
    run = relax(
        obj,
        path,
        0.3,
        ProjectedSGD(lr, batch_size, project_every=k, steps=900),
        replicas=16,
        seed=1,
    )
    measured = drift(run, confidence=0.999)
    predicted = float(predicted_velocity(run.position, lr, batch_size, k).mean())
    assert measured.low < predicted < measured.high
    assert measured.excludes_zero and measured.high - measured.low < predicted
    if k == 15:  # adiabatic limit: the entropic force of the effective potential
        limit = -FAST * SLOPE / 2 * lr / (2 * batch_size)
        assert 0.7 < predicted / limit < 1.2


def test_drift_grows_with_temperature_and_reverses_with_the_slope():
    obj, path = valley()
    common = dict(batch_size=4, steps=600, seed=2)
    cold, hot = (
        displacement(relax_with(obj, path, 0.3, lr=lr, replicas=12, **common))
        for lr in (0.01, 0.03)
    )
    assert hot.low > cold.high > 0  # nine times farther in as many updates
    other = displacement(relax_with(valley(-SLOPE)[0], path, 0.6, lr=0.03, replicas=12, **common))
    assert other.high < 0


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_other_optimizers_drift_down_the_stiffness_too(optimizer):
    obj, path = valley()
    lr = 0.01 if optimizer == "nesterov" else 0.003
    run = relax(obj, path, 0.3, ProjectedSGD(lr, 4, steps=450, optimizer=optimizer), replicas=8)
    assert displacement(run).low > 0


def test_without_noise_or_with_projection_at_every_update_nothing_moves():
    obj, path = valley()
    full = relax(obj, path, 0.3, ProjectedSGD(0.04, N, steps=45), replicas=3)
    each = relax(obj, path, 0.3, ProjectedSGD(0.04, 4, project_every=1, steps=300), replicas=3)
    flat = relax(valley(0.0)[0], path, 0.3, ProjectedSGD(0.04, 4, steps=300), replicas=3)
    for run in (full, each, flat):
        assert float((run.position - 0.3).abs().max()) < 1e-12
    assert float(each.distance[:, 1:].min()) > 1e-3  # there was noise across the path
