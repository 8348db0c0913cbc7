"""Dense evaluation, barrier and saddle against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from entropic_fast._utils.table import Table
from entropic_fast.objective import Objective
from entropic_fast.objective.losses import CrossEntropy
from entropic_fast.paths import Path, barrier, linear_path, path_losses, saddle


def quadratic(params=3, examples=5, seed=0):
    """Least squares without bias: the loss along a line is an exact parabola."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, params, generator=generator, dtype=torch.float64)
    y = torch.randn(examples, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(params, 1, bias=False).double()
    return Objective(model, "mse", (x, y), batch_size=2), x, y


def test_losses_are_those_of_the_points():
    obj, x, y = quadratic()
    path = Path(torch.randn(4, 3, dtype=torch.float64))
    table = path_losses(obj, path, points=2)
    assert table.columns == ("s", "loss", "is_pivot")
    assert table.num_rows == 3 * 3 + 1
    assert table["s"][table["is_pivot"]].tolist() == path.positions.tolist()
    for s, loss in zip(table["s"], table["loss"], strict=True):
        want = ((x @ path.point(float(s))[:, None] - y) ** 2).mean()
        assert loss == pytest.approx(float(want), rel=1e-12)


def test_positions_may_be_given():
    obj, _, _ = quadratic()
    path = linear_path(torch.zeros(3).double(), torch.ones(3).double(), pivots=3)
    table = path_losses(obj, path, [0.0, 0.5, 0.75])
    assert table["s"].tolist() == [0.0, 0.5, 0.75]
    assert table["is_pivot"].tolist() == [True, True, False]
    seen = []
    path_losses(obj, path, torch.tensor([0.5]), on_point=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 1)]


def test_coinciding_pivots_are_evaluated_once():
    obj, _, _ = quadratic(params=1)
    path = Path(torch.tensor([[0.0], [1.0], [1.0], [2.0]], dtype=torch.float64))
    assert path_losses(obj, path, points=1)["s"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_accuracy_is_reported_for_classifiers():
    x = torch.tensor([[1.0], [2.0], [-1.0]])
    obj = Objective(nn.Linear(1, 2, bias=False), "cross_entropy", (x, torch.tensor([0, 0, 0])))
    path = linear_path(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    table = path_losses(obj, path, points=0)
    assert table["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert table["loss"][0] == pytest.approx(
        np.mean([math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2)), math.log(1 + math.e)])
    )


def test_running_statistics_are_re_estimated_at_every_point():
    torch.manual_seed(0)
    x, y = torch.randn(40, 3).double(), torch.randint(0, 2, (40,))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    obj = Objective(model, "cross_entropy", (x, y), batch_size=40)
    a = obj.parameters_vector()
    path = linear_path(a, a + 0.5 * torch.randn_like(a), pivots=3)
    table = path_losses(obj, path, points=1)
    for s, loss in zip(table["s"], table["loss"], strict=True):
        obj.load_into(model, path.point(float(s)))
        # One batch of 40: its mean and its unbiased variance are the statistics.
        hidden = model[0](x).detach()
        mean, variance = hidden.mean(0), hidden.var(0, unbiased=True)
        normal = (hidden - mean) / (variance + model[1].eps).sqrt()
        out = model[3](torch.relu(normal * model[1].weight + model[1].bias))
        want = nn.functional.cross_entropy(out, y).detach()
        assert loss == pytest.approx(float(want), rel=1e-10)


def test_a_path_of_another_model_is_refused():
    obj, _, _ = quadratic()
    line = linear_path(torch.zeros(4).double(), torch.ones(4).double())
    with pytest.raises(ValueError, match="pivots of 3 parameters"):
        path_losses(obj, line)
    with pytest.raises(ValueError, match="float64"):
        path_losses(obj, linear_path(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize("points", [-1, [0.5, 1.5], [], torch.zeros(2, 2)])
def test_bad_positions_are_refused(points):
    obj, _, _ = quadratic()
    with pytest.raises(ValueError, match=r"points|positions in \[0, 1\]"):
        path_losses(obj, linear_path(torch.zeros(3).double(), torch.ones(3).double()), points)


@pytest.mark.parametrize("classifier", [False, True])
def test_points_that_overflow_are_infinite_and_named_once(classifier):
    x = torch.tensor([[1.0]])
    y = torch.tensor([0]) if classifier else torch.tensor([[0.0, 0.0]])

    class Root(CrossEntropy):
        def __call__(self, outputs, targets):
            return (outputs[:, 0] - 0.5).sqrt()

    root = Root(nn.CrossEntropyLoss(reduction="none"))
    loss = root if classifier else lambda outputs, targets: root(outputs, targets)
    obj = Objective(nn.Linear(1, 2, bias=False), loss, (x, y))
    path = linear_path(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    seen = []
    told = r"not finite at 2 of 5 points.* s = 0\.75.*example 0"
    with pytest.warns(RuntimeWarning, match=told) as warned:
        table = path_losses(obj, path, points=3, on_point=lambda i, n: seen.append((i, n)))
    assert len(warned) == 1 and warned[0].filename == __file__
    assert table["loss"].tolist() == pytest.approx([0.5**0.5, 0.5, 0.0, math.inf, math.inf])
    assert seen == [(i + 1, 5) for i in range(5)]
    if classifier:
        assert np.isnan(table["accuracy"]).tolist() == [False, False, False, True, True]
    rise = barrier(table)
    assert (rise.over_max, rise.over_mean, rise.max_loss, rise.position) == (*[math.inf] * 3, 0.75)
    found = saddle(table)
    assert (found.position, found.loss, found.bracket) == (0.75, math.inf, (0.5, 1.0))


def test_barrier_is_over_the_higher_end_and_over_the_mean():
    found = barrier(Table({"s": [0.0, 0.25, 1.0], "loss": [1.0, 5.0, 3.0]}))
    assert (found.over_max, found.over_mean, found.max_loss, found.position) == (2, 3, 5, 0.25)
    falling = barrier(Table({"s": [0.0, 1.0], "loss": [4.0, 1.0]}))
    assert (falling.over_max, falling.over_mean) == (0.0, 1.5)


def test_the_saddle_is_the_vertex_of_a_parabola_at_unequal_spacing():
    s = np.array([0.0, 0.3, 0.55, 0.9, 1.0])
    found = saddle(Table({"s": s, "loss": 2 - 3 * (s - 0.6) ** 2}))
    assert found.position == pytest.approx(0.6) and found.loss == pytest.approx(2.0)
    assert found.bracket == (0.3, 0.9)
    assert found.sampled_loss == pytest.approx(2 - 3 * 0.05**2)


def test_the_saddle_stays_in_its_bracket():
    s = np.linspace(0, 1, 6)
    for losses in ([0, 1, 1, 1, 0, 0], [0, 0, 3, 3 - 1e-12, 0, 0]):
        found = saddle(Table({"s": s, "loss": losses}))
        low, high = found.bracket
        assert low <= found.position <= high and found.loss >= found.sampled_loss


def test_a_path_without_an_interior_maximum_has_its_saddle_at_the_end():
    found = saddle(Table({"s": [0.0, 0.5, 1.0], "loss": [0.0, 1.0, 3.0]}))
    assert (found.position, found.loss, found.bracket) == (1.0, 3.0, (0.5, 1.0))


def test_tables_that_are_no_whole_path_are_refused():
    for s in ([0.0, 0.5], [0.0, 0.6, 0.5, 1.0], [0.0]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            barrier(Table({"s": s, "loss": np.zeros(len(s))}))
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="losses that are finite, or inf"):
            saddle(Table({"s": [0.0, 1.0], "loss": [0.0, wrong]}))


def test_a_saddle_among_infinite_losses_lies_between_finite_ones():
    s = np.linspace(0, 1, 6)
    losses = [0.0, 1.0, math.inf, math.inf, 2.0, math.inf]
    found = saddle(Table({"s": s, "loss": losses}))
    assert (found.position, found.bracket) == (s[2], (s[1], s[4]))
    assert math.isinf(found.loss) and math.isinf(found.sampled_loss)


@pytest.mark.parametrize("recalibrated", [False, True])
def test_a_wall_in_the_middle_of_a_path_keeps_both_sides(recalibrated):
    """Logits overflow between two points where they do not, with and without statistics."""
    layers = [nn.Linear(2, 3), nn.BatchNorm1d(3)] if recalibrated else [nn.Linear(2, 3)]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(3, 2)).eval()
    obj = Objective(model, "cross_entropy", (torch.randn(12, 2), torch.arange(12) % 2))
    theta = obj.parameters_vector()
    far = theta.clone()
    far[-8:] = 3e38  # of the last layer: sums of two overflow
    path = Path(torch.stack([theta, far, theta + 0.1]))
    with pytest.warns(RuntimeWarning, match=r"not finite at \d of 5 points"):
        table = path_losses(obj, path, points=1)
    alone = path_losses(obj, Path(torch.stack([theta, theta + 0.1])), points=0)
    ends = table["loss"][[0, -1]]
    assert ends.tolist() == pytest.approx(alone["loss"].tolist())
    assert math.isinf(table["loss"][2]) and barrier(table).over_max == math.inf
