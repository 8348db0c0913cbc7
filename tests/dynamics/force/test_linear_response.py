"""Linear response and noise factors against simulation, update by update, and closed forms."""

import pytest
import torch

from entropic_fast.dynamics import ProjectedSGD
from entropic_fast.dynamics.force._linear_response import (
    MinibatchCovariance,
    impulse_response,
    response,
)
from entropic_fast.dynamics.projected_sgd._minibatches import Minibatches
from entropic_fast.objective import Objective

SETTINGS = [
    ProjectedSGD(0.1, 4, project_every=3, steps=7),
    ProjectedSGD(0.05, 4, project_every=5, steps=10, momentum=0.9),
    ProjectedSGD(0.05, 4, project_every=4, steps=9, optimizer="nesterov", weight_decay=0.3),
    ProjectedSGD(0.2, 4, project_every=1, steps=3),
    ProjectedSGD(0.2, 4, project_every=20, steps=1, momentum=0.5),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_responses_add_up_to_what_torch_optim_does(settings):
    stiffness = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    noise = torch.randn(settings.steps, 3, generator=torch.Generator().manual_seed(1)).double()
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(
        [w],
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.optimizer == "nesterov",
    )
    seen, reached = [], []
    for j in range(settings.steps):
        seen.append(w.detach().clone())
        w.grad = stiffness * w.detach() + noise[j]
        optimizer.step()
        reached.append(w.detach().clone())
        if (j + 1) % settings.project_every == 0:
            with torch.no_grad():
                w.zero_()
    found = response(stiffness, settings)
    for got, expected in ((found.pre_update, seen), (found.post_update, reached)):
        total = torch.einsum("ijm,mi->ji", got, noise)
        torch.testing.assert_close(total, torch.stack(expected), rtol=1e-12, atol=1e-13)


def test_without_projection_a_force_goes_on_acting_through_momentum():
    settings = ProjectedSGD(0.1, 4, steps=6, momentum=0.8)
    left = torch.arange(6, 0, -1).double()
    expected = 0.1 * (1 - 0.8**left) / (1 - 0.8)
    torch.testing.assert_close(impulse_response(settings), expected)


def test_plain_sgd_is_the_ar1_process():
    settings = ProjectedSGD(0.1, 4, project_every=20, steps=20)
    found = response(torch.tensor([2.0]), settings)
    squares = MinibatchCovariance(4, 10**9).squares(found.post_update)[0]
    rho = 0.8
    j = torch.arange(1, 21).double()
    expected = 0.1**2 / 4 * (1 - rho ** (2 * j)) / (1 - rho**2)
    torch.testing.assert_close(squares, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("n", "b", "steps"), [(12, 3, 9), (13, 5, 7), (6, 6, 4), (5, 1, 12)])
def test_noise_factors_are_the_covariances_of_the_minibatches_drawn(n, b, steps):
    # Over many seeds: one example's gradient is its own number.
    g = torch.Generator().manual_seed(0)
    values = torch.randn(n, 2, generator=g, dtype=torch.float64)
    values = values - values.mean(0)
    obj = Objective(torch.nn.Linear(1, 1), "mse", (torch.zeros(n, 1), torch.zeros(n, 1)))
    draws = 1000
    batches = Minibatches(obj, b, 3, range(draws))
    noise = torch.stack([values[batches.indices(j)].mean(1) for j in range(steps)])  # [n, D, 2]
    settings = ProjectedSGD(0.3, b, project_every=4, steps=steps, momentum=0.5)
    seen = response(torch.tensor([1.0, 0.2]), settings).pre_update
    w = torch.einsum("ijm,mdi->jdi", seen, noise)
    weights = torch.rand(steps, generator=g).double()
    sampling = MinibatchCovariance(b, n)
    factors = sampling.moments(seen, seen, weights)
    expected = factors * (values.T @ values / n)
    each = torch.einsum("j,jdi,jdl->dil", weights, w, w)  # [D, 2, 2]
    error = each.std(0) / draws**0.5
    assert bool(((each.mean(0) - expected).abs() <= 4.5 * error + 1e-15).all())
    squares = sampling.squares(seen) * (values.square().mean(0))[:, None]
    assert torch.einsum("j,ij->i", weights, squares).tolist() == pytest.approx(
        expected.diagonal().tolist(), rel=1e-12, abs=1e-15
    )
    if b == n:
        assert float(factors.abs().max()) == 0.0


def test_strength_grows_as_the_recursion_says():
    # dw = - lr (lambda + kappa_b) w - lr xi: E w^2 <- ((1 - lr lambda)^2 + lr^2 q) E w^2 + lr^2.
    settings = ProjectedSGD(0.1, 1, project_every=12, steps=12)
    found, sampling = response(torch.tensor([2.0]), settings), MinibatchCovariance(1, 10**12)
    spread = 30.0
    multiplier = sampling.noise_multiplier(found.pre_update, torch.tensor([1.0]).double(), spread)
    squares = sampling.squares(found.post_update, multiplier)[0]
    expected, value = [], 0.0
    for _ in range(12):
        value = (0.8**2 + 0.01 * spread) * value + 0.01
        expected.append(value)
    assert squares.tolist() == pytest.approx(expected, rel=1e-9)
    assert (
        sampling.noise_multiplier(found.pre_update, torch.tensor([1.0]).double(), 0.0).tolist()
        == [1.0] * 12
    )


def test_bad_settings_are_refused():
    for bad in (
        {"lr": 0.0},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"steps": 0},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            ProjectedSGD(**{"lr": 0.1, "batch_size": 2, **bad})
    with pytest.raises(ValueError, match="batch_size: expected at most the 4 examples"):
        MinibatchCovariance(5, 4)
