"""Projection onto a path, and one step of AutoNEB beside its plain gradients."""

import pytest
import torch
from torch import nn

from entropic_fast.objective import Objective
from entropic_fast.paths import AutoNEBConfig, Path, auto_neb
from entropic_fast.training.models import build, initialize

PIVOTS, BATCH = 9, 128


@pytest.fixture(scope="module")
def digits_objective():
    """The digits CNN on random images of the digits' shape."""
    torch.manual_seed(0)
    data = torch.randn(BATCH, 1, 8, 8), torch.randint(0, 10, (BATCH,))
    return Objective(initialize(build("digits-cnn"), seed=0), "cross_entropy", data)


@pytest.mark.parametrize("params", [14_378, 272_474])
def test_projection(benchmark, params):
    torch.manual_seed(0)
    path, theta = Path(torch.randn(PIVOTS, params)), torch.randn(params)
    benchmark(path.project, theta)


def test_plain_gradients_of_the_pivots(benchmark, digits_objective):
    """The floor of a step: gradients of the interior pivots, losses of the ends."""
    inputs, targets = digits_objective.tensors()
    model = build("digits-cnn")

    def step():
        for _ in range(PIVOTS - 2):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            model(inputs), model(inputs)

    benchmark(step)


def test_ten_steps_of_auto_neb(benchmark, digits_objective):
    """Ten steps and the dense evaluation at the end of the cycle."""
    a = digits_objective.parameters_vector()
    config = AutoNEBConfig(pivots=PIVOTS, cycles=[(10, 0.01)], batch_size=BATCH, eval_points=1)
    benchmark(auto_neb, digits_objective, a, a + 0.1 * torch.randn_like(a), config)
