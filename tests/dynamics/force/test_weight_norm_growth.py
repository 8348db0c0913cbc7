"""Norm growth of scale-invariant weights, as a part of the entropic force."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from entropic_fast.dynamics import ForceSettings, ProjectedSGD
from entropic_fast.dynamics.force._drift import measure_drift, noiseless_drift
from entropic_fast.dynamics.force._point_force import point_force
from entropic_fast.dynamics.force._subsets import as_in_dynamics, first_examples
from entropic_fast.dynamics.force._weight_norm_growth import (
    radial_share,
    scale_invariant_rows,
)
from entropic_fast.objective import Objective
from entropic_fast.paths import linear_path
from entropic_fast.training.models import digits_cnn


class Direction(nn.Module):
    """Loss of example e: stiff / 2 |W' / |W||^2 + xi_e . W / |W|, W' all of W but its first
    coordinate, xi along W' only: scale-invariant, least along the whole first axis."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())

    def forward(self, xi):  # [B, 3] -> [B]
        unit = (self.weight / self.weight.norm())[0]
        return 5.0 * unit[1:].square().sum() + xi @ unit[1:]


def radial_path():
    g = torch.Generator().manual_seed(0)
    xi = torch.randn(512, 3, generator=g, dtype=torch.float64)
    xi = torch.cat([xi, -xi])
    obj = Objective(
        Direction(), lambda out, _: out, (xi, torch.zeros(1024)), norm="batch", batch_size=8
    )
    ends = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]], dtype=torch.float64)
    return obj, linear_path(*ends)


def test_on_a_radial_path_all_of_the_force_is_norm_growth():
    obj, path = radial_path()
    settings = ProjectedSGD(0.02, 8, project_every=10, steps=10)
    options = dict(directions=3, complement_examples=0, heterogeneity_draws=0, step=1e-3, tol=1e-8)
    for s in (0.2, 0.7):
        point = point_force(obj, path, s, ForceSettings(**options))
        w = 1.0 + 2.0 * s
        assert point.stiffness[:3].tolist() == pytest.approx([10.0 / w**2] * 3, rel=1e-5)
        # Curvature falls as 1 / |W|^2.
        expected = -2 * point.stiffness[:3] / w
        torch.testing.assert_close(point.curvature_slope, expected, rtol=1e-4, atol=0)
        found = radial_share(obj, path, point, settings)
        assert found.share == pytest.approx(1.0, rel=1e-4)
        assert (found.tangent, found.rows) == (pytest.approx(1.0), 1)
        # 128 batches stand for 1024 examples: the noise is theirs to a few per cent.
        assert float(point.noise[:3].sum()) == pytest.approx(3 / w**2, rel=0.2)
        run = measure_drift(obj, path, [s], settings, replicas=300, seed=4)
        interval = run.interval(0, 0.999)
        assert interval.low > 0
        assert interval.low < found.radial * 1.15 and found.radial * 0.85 < interval.high
        still = float(noiseless_drift(obj, path, [s], settings.replace(batch_size=512))[0])
        assert abs(still) < 0.1 * interval.value


def test_filters_before_batch_normalization_are_found_and_no_others():
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(32) % 10
    for norm, expected in (("batch", ["0.weight", "3.weight", "6.weight"]), ("none", [])):
        torch.manual_seed(0)
        model = digits_cnn(norm)
        obj = Objective(model, "cross_entropy", (x, y), norm="batch", batch_size=16)
        found = scale_invariant_rows(obj)
        assert list(found) == expected
        theta = obj.parameters_vector()
        for name, rows in found.items():
            assert torch.equal(theta[rows], obj.split(theta)[name].flatten(1))
        running = Objective(model, "cross_entropy", (x, y))
        assert scale_invariant_rows(running) == {}


def test_without_scale_invariant_weights_nothing_grows():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    obj = Objective(nn.Linear(3, 2).double(), "mse", (x, x[:, :2]))
    start = obj.parameters_vector()
    path = linear_path(start, start + 1)
    point = point_force(
        obj, path, 0.5, ForceSettings(directions=3, complement_examples=4, heterogeneity_draws=1)
    )
    found = radial_share(obj, path, point, ProjectedSGD(0.01, 4))
    assert (found.radial, found.share, found.rows) == (0.0, 0.0, 0)


def test_the_share_on_the_first_examples_is_that_of_an_objective_of_these():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    obj = Objective(net, "cross_entropy", (x, (x[:, 0] > 0).long()), norm="batch", batch_size=16)
    start = obj.parameters_vector()
    path = linear_path(start, start + 0.1 * torch.randn_like(start))
    settings = ProjectedSGD(0.02, 8, project_every=10, steps=10)
    point = point_force(
        obj, path, 0.5, ForceSettings(directions=3, complement_examples=0, max_examples=16)
    )
    found = radial_share(obj, path, point, settings)
    of_all = replace(point, max_examples=None)
    of_these = first_examples(as_in_dynamics(obj), 16)  # one batch, in whatever order
    expected = radial_share(of_these, path, of_all, settings)
    assert found.radial == pytest.approx(expected.radial, rel=1e-9)
    assert found.radial != radial_share(obj, path, of_all, settings).radial
