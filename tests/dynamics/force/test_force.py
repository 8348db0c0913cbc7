"""Measured drift against the prediction in valleys whose drift is known in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from force_valleys import valley

from entropic_fast.curvature import HessianOperator
from entropic_fast.dynamics import ForceSettings, ProjectedSGD
from entropic_fast.dynamics.force._comparison import (
    compare_force,
    fit_force,
    shuffled_curvature,
    slope_with_errors,
)
from entropic_fast.dynamics.force._drift import (
    measure_drift,
    noiseless_drift,
    tangent_gradients,
)
from entropic_fast.dynamics.force._gradient_noise import GradientNoise
from entropic_fast.dynamics.force._point_force import point_force
from entropic_fast.dynamics.force._subsets import forms_by_parts, mean_of_parts
from entropic_fast.dynamics.force._temperature import effective_temperature
from entropic_fast.dynamics.projected_sgd._relax import relax
from entropic_fast.objective import Objective
from entropic_fast.ops.random_bits.streams import permutation
from entropic_fast.paths import linear_path

PLACES = (0.2, 0.4, 0.6, 0.8)
SGD = ProjectedSGD(0.02, 4)
MIXED = dict(stiffness=(10.0, 3.0, 1.0), slopes=(-0.5, 1.0, 0.3), noise=(0.5, 2.0, 1.0))


def exact(points, **options):
    return ForceSettings(
        directions=points,
        complement_examples=0,
        heterogeneity_draws=0,
        step=1e-3,
        tol=1e-8,
        **options,
    )


def test_the_prediction_is_the_closed_form_of_a_valley():
    obj, path = valley()
    y, settings = 0.3, SGD
    g = 10.0 * torch.exp(torch.tensor(-0.5 * y, dtype=torch.float64))
    rho, n, b = 1 - settings.lr * g, 2048, settings.batch_size
    square = 0.0
    for j in range(15):
        weights = torch.stack([rho**i for i in range(j)]) if j else torch.zeros(1).double()
        squares, pairs = weights.square().sum(), weights.sum() ** 2
        one = (n - b) / (n - 1) / b
        square += settings.lr**2 * (squares * one - (pairs - squares) / (n - 1)) / 15
    expected = 0.5 * 0.5 * g * 8 * square
    point = point_force(obj, path, y, exact(8))
    assert point.entropic(settings).value == pytest.approx(float(expected), rel=1e-5)
    assert point.stiffness[:8].tolist() == pytest.approx([float(g)] * 8)
    assert point.noise[:8].tolist() == pytest.approx([1.0] * 8)
    assert point.curvature_slope.tolist() == pytest.approx([-0.5 * float(g)] * 8, rel=1e-5)
    # The effective potential (T / 2) log det H, T = lr / 2 B: eight directions of slope -1/2.
    limit = 8 * 0.5 / 2 * settings.lr / (2 * b)
    assert point.potential(settings) == pytest.approx(limit, rel=2e-3)
    assert point.stationary(settings) == pytest.approx(limit, rel=2e-3)
    assert abs(point.without_replacement(settings)) < 1e-9 * limit
    assert point.noise_share == pytest.approx(1.0)


def test_long_cycles_approach_the_potential_of_the_temperatures():
    obj, path = valley(**MIXED)
    point = point_force(obj, path, 0.5, exact(3))
    for momentum in (0.0, 0.5):
        settings = ProjectedSGD(0.02, 1, project_every=1500, steps=1500, momentum=momentum)
        ratio = point.entropic(settings).value / point.stationary(settings)
        assert 0.93 < ratio < 1.07  # small lr and long cycles, not the limit itself
    assert point.potential(settings) != pytest.approx(point.stationary(settings), rel=0.05)


def test_the_noise_is_that_of_all_examples_whatever_the_curvature_is_taken_on():
    obj, path = valley(rise=-1.0)
    inputs, targets = obj.tensors()
    half = len(inputs) // 2
    loud = torch.cat([inputs[:half], 5 * inputs[half:]])
    obj = obj.with_data((loud, targets))
    whole = point_force(obj, path, 0.3, exact(8))
    part = point_force(obj, path, 0.3, exact(8, max_examples=half))
    assert float(part.noise.sum()) == pytest.approx(float(whole.noise.sum()), rel=1e-6)
    assert float(part.noise_slope.sum()) == pytest.approx(float(whole.noise_slope.sum()), rel=1e-5)
    assert abs(float(whole.noise_slope.sum())) > 1e-3


@pytest.mark.parametrize("rest", [False, True])
def test_what_lies_beyond_the_directions_is_found_from_single_examples(rest):
    obj, path = valley()
    whole = point_force(obj, path, 0.3, exact(8)).entropic(SGD).value
    few = point_force(
        obj,
        path,
        0.3,
        ForceSettings(
            directions=3, complement_examples=256 if rest else 0, heterogeneity_draws=0, step=1e-3
        ),
    )
    assert few.noise_share == pytest.approx(3 / 8, rel=1e-6)
    found = few.entropic(SGD)
    assert few.entropic(SGD, complement=False).value == pytest.approx(whole * 3 / 8, rel=1e-5)
    if rest:  # directions that are alike: every sample has the same form
        assert found.value == pytest.approx(whole, rel=1e-5) and found.std_error < 1e-9 * whole
        assert float(few.stiffness[-1]) == pytest.approx(float(few.stiffness[0]), rel=1e-6)
    else:
        assert found.value == pytest.approx(whole * 3 / 8, rel=1e-5)


def test_the_error_of_the_rest_is_that_of_its_samples():
    """Two directions of one stiffness here whose curvature changes differently."""
    obj, path = valley(stiffness=(20.0, 3.0, 3.0), slopes=(-0.5, 2.0, 0.5), noise=(0.5, 1.0, 3.0))
    whole = point_force(obj, path, 0.01, exact(3)).entropic(SGD).value
    few = dict(directions=1, complement_examples=48, heterogeneity_draws=0, step=1e-3)
    found = [
        point_force(obj, path, 0.01, ForceSettings(**few), seed=i).entropic(SGD) for i in range(12)
    ]
    pulls = [(f.value - whole) / f.std_error for f in found]
    assert max(map(abs, pulls)) < 5 and 0.2 < torch.tensor(pulls).std() < 1.5
    assert max(f.std_error for f in found) < 0.3 * abs(whole)


@pytest.mark.parametrize("max_examples", [None, 4])
def test_the_rest_of_all_examples_has_no_error_of_sampling(max_examples):
    obj, path = valley(**MIXED)
    x, y = obj.tensors()
    obj = obj.with_data((x[:12], y[:12]))
    few = dict(directions=1, heterogeneity_draws=0, step=1e-3, max_examples=max_examples)
    point = point_force(obj, path, 0.3, ForceSettings(complement_examples=12, **few))
    assert (point.curvature_moments_error == 0.0) == (max_examples is None)
    assert (
        point_force(
            obj, path, 0.3, ForceSettings(complement_examples=6, **few)
        ).curvature_moments_error
        > 0
    )


CASES = [
    (valley(), SGD),
    (valley(tilt=0.02), SGD),
    (valley(**MIXED), ProjectedSGD(0.05, 4, project_every=15, steps=30)),
    (valley(**MIXED, tilt=-0.05), ProjectedSGD(0.01, 4, steps=30, momentum=0.8)),
    (valley(**MIXED), ProjectedSGD(0.01, 4, steps=30, optimizer="nesterov", weight_decay=0.1)),
    (valley(), SGD.replace(project_every=5)),
]


@pytest.mark.parametrize(("made", "settings"), CASES)
def test_measured_drift_is_the_predicted_one(made, settings):
    obj, path = made
    count = path.num_params - 1
    found = compare_force(
        obj,
        path,
        PLACES,
        settings,
        replicas=96,
        seed=1,
        confidence=0.999,
        force=exact(count),
    )
    slope = found.fit.slope
    assert slope.low < 1.0 < slope.high
    assert slope.low > 0.5 and found.fit.p_value > 1e-3
    if settings.weight_decay == 0:
        torch.testing.assert_close(
            torch.from_numpy(found.table["gradient"]),
            torch.full((4,), -obj.module.tilt).double(),
            rtol=1e-6,
            atol=1e-9,
        )


def test_the_energetic_part_is_what_all_examples_give():
    obj, path = valley(tilt=0.05)
    for settings in (
        SGD,
        SGD.replace(momentum=0.5),
        SGD.replace(weight_decay=0.2, project_every=5),
    ):
        ours = noiseless_drift(obj, path, PLACES, settings)
        run = relax(
            obj,
            path,
            list(PLACES),
            ProjectedSGD(
                settings.lr,
                obj.num_examples,
                project_every=settings.project_every,
                steps=settings.steps,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            ),
        )
        theirs = (run.position[:, -1] - run.position[:, 0]) / settings.effective_time
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    steady = noiseless_drift(obj, path, PLACES, SGD)
    assert steady.tolist() == pytest.approx([-0.05] * 4)


def test_a_point_on_a_slope_is_pushed_downhill():
    obj, path = valley(tilt=0.05)
    assert point_force(obj, path, 0.4, exact(1)).energetic == pytest.approx(-0.05)


def test_subtracting_the_noise_along_the_path_changes_no_mean_and_most_of_the_spread():
    # With noise along the path: the examples' losses are tilted too.
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    obj = Objective(torch.nn.Linear(3, 1, bias=False).double(), "mse", (x, x[:, :1]))
    ends = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    path = linear_path(*ends)
    settings = ProjectedSGD(0.005, 8, project_every=5, steps=10, momentum=0.5)
    found = measure_drift(obj, path, [0.3, 0.6], settings, replicas=200)
    assert found.control
    spread = found.velocity.std(1) / found.raw.std(1)
    assert float(spread.max()) < 0.3
    difference = found.velocity - found.raw
    error = difference.std(1) / 200**0.5
    assert bool((difference.mean(1).abs() < 4 * error).all())
    plain = measure_drift(obj, path, [0.3, 0.6], settings, replicas=200, control=False)
    assert torch.equal(plain.velocity, found.raw)
    gradients = tangent_gradients(obj, path, 0.3)
    expected = -2 * (x[:, :1] - x @ path.point(0.3)[:, None])[:, 0] * x[:, 0]
    torch.testing.assert_close(gradients, expected)


def test_with_projection_at_every_update_or_all_examples_there_is_no_force():
    obj, path = valley()
    point = point_force(obj, path, 0.4, exact(8))
    assert point.entropic(SGD.replace(project_every=1)).value == 0.0
    assert point.entropic(SGD.replace(batch_size=2048)).value == 0.0
    for settings in (SGD.replace(project_every=1), SGD.replace(batch_size=2048)):
        run = measure_drift(obj, path, [0.4], settings, replicas=3)
        assert float(run.velocity.abs().max()) < 1e-12
    predicted = [point.entropic(SGD.replace(project_every=k, steps=k)).value for k in (1, 2, 5, 15)]
    assert predicted == sorted(predicted)


@pytest.mark.parametrize("k", [2, 8])
def test_minibatches_of_an_epoch_exclude_one_another_and_push_down_the_noise(k):
    # Stiffness is the same everywhere, so there is no entropic force.
    obj, path = valley(
        stiffness=(1.0, 1.0), slopes=(0.0, 0.0), noise=(1.0, 1.0), rise=-1.0, examples=64
    )
    settings = ProjectedSGD(0.05, 8, project_every=k, steps=8)
    point = point_force(obj, path, 0.4, exact(2))
    expected = point.without_replacement(settings)
    # - (lr (k - 1) / 2 / (N - 1)) (1/2) d tr C / ds, but for the stiffness.
    change = -2.0 * 2 * torch.exp(torch.tensor(-0.8)).item()
    assert expected == pytest.approx(-0.05 * (k - 1) / 2 / 63 * 0.5 * change, rel=0.15)
    assert abs(point.entropic(settings).value) < 1e-4 * expected
    found = measure_drift(obj, path, [0.4], settings, replicas=200, seed=2)
    interval = found.interval(0, 0.999)
    assert interval.low < expected < interval.high and interval.low > 0


def test_noise_grows_away_from_the_path_where_examples_differ_in_curvature():
    obj, path = valley(stiffness=(2.0, 2.0), slopes=(-1.0, -1.0), noise=(1.0, 1.0), bend=10.0)
    settings = ProjectedSGD(0.05, 4, project_every=15, steps=15)
    point = point_force(obj, path, 0.4, replace(exact(2), heterogeneity_draws=2))
    assert point.noise_heterogeneity == pytest.approx(10.0**2, rel=1e-6)
    drift = measure_drift(obj, path, [0.4], settings, replicas=1000, seed=3)
    for spread, holds in ((True, True), (False, False)):
        found = effective_temperature(drift, 0, point, noise_heterogeneity=spread, confidence=0.999)
        assert (found.ratio.low < 1.0 < found.ratio.high) == holds
        assert found.predicted == pytest.approx(0.05 / 8, rel=1e-2)
    assert found.ratio.value > 1.15  # hotter than the noise on the path
    interval = drift.interval(0, 0.999)
    assert interval.low < point.entropic(settings).value < interval.high


def test_the_temperature_of_a_valley_is_lr_over_two_b():
    obj, path = valley()
    drift = measure_drift(obj, path, [0.3, 0.7], SGD.replace(steps=60), replicas=24, seed=5)
    for i, s in enumerate((0.3, 0.7)):
        found = effective_temperature(drift, i, point_force(obj, path, s, exact(8)))
        assert found.predicted == pytest.approx(0.02 / 8, rel=2e-3)
        assert found.measured.low < found.predicted < found.measured.high
        assert found.ratio.high - found.ratio.low < 0.3
    with pytest.raises(ValueError, match=r"point: expected the force at s = 0\.3"):
        effective_temperature(drift, 0, point_force(obj, path, 0.7, exact(8)))


def test_shuffled_curvature_explains_nothing():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, generator=g).double().numpy()
    noise = 0.1 * torch.randn(8, generator=g).double().numpy()
    related = shuffled_curvature(x, x + noise, [0.1] * 8)
    assert related[0] > 0.9 and related[1] < 0.01
    p = [
        shuffled_curvature(x, torch.randn(8, generator=g).double().numpy(), [1.0] * 8)[1]
        for _ in range(40)
    ]
    assert 0.25 < sum(p) / len(p) < 0.75  # uniform under the null: sd of the mean 0.046


def test_a_fit_is_by_replicas_and_says_when_proportionality_fails():
    g = torch.Generator().manual_seed(1)
    x = torch.tensor([1.0, 2.0, -1.0, -3.0], dtype=torch.float64)
    covered = 0
    for _ in range(200):
        y = 0.7 * x[:, None] + torch.randn(4, 12, generator=g, dtype=torch.float64)
        fit = fit_force(x, y, 0.9)
        covered += fit.slope.low < 0.7 < fit.slope.high
    assert 0.9 - 4.5 * 0.021 < covered / 200 < 0.9 + 4.5 * 0.021
    wrong = fit_force(x, y + x.square()[:, None])
    assert wrong.p_value < 1e-4 and fit.p_value > 1e-4
    y[0, 0] = torch.nan
    assert len(fit_force(x, y).slope.samples) == 11
    for bad_x, bad_y in ((x[:3], y), (0 * x, y), (x, y[:, :1]), (x, torch.ones(4, 5))):
        with pytest.raises(ValueError, match=r"measured.*expected"):
            fit_force(bad_x, bad_y)


def test_bad_arguments_are_refused():
    obj, path = valley()
    for s in (0.0, 1.0, 0.0005):
        with pytest.raises(ValueError, match="position: expected s with"):
            point_force(obj, path, s, ForceSettings(step=1e-3))
    with pytest.raises(ValueError, match="directions: expected"):
        point_force(obj, path, 0.5, ForceSettings(directions=0))
    point = point_force(obj, path, 0.5, exact(2))
    with pytest.raises(ValueError, match="batch_size: expected at most the 2048"):
        point.entropic(SGD.replace(batch_size=4096))
    with pytest.raises(ValueError, match="positions: expected positions"):
        measure_drift(obj, path, 0.5, SGD)


def sorted_classes():
    """A network with batch normalization, and examples in the order of their classes."""
    torch.manual_seed(3)
    y = torch.arange(4).repeat_interleave(30)
    x = torch.randn(120, 3, dtype=torch.float64) + 2 * torch.nn.functional.one_hot(y)[:, :3]
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 4)
    ).double()
    obj = Objective(net, "cross_entropy", (x, y))
    start = obj.parameters_vector()
    return obj, linear_path(start, start + 0.1 * torch.randn_like(start))


def test_noise_with_batch_statistics_is_that_of_random_batches_whatever_the_datas_order():
    obj, path = sorted_classes()
    theta, u = path.point(0.4), path.tangent(0.4)
    twin, gradients = obj.with_norm("batch").with_data(obj.tensors(), batch_size=8), []
    x, y = obj.tensors()
    for seed in range(2000):
        index = permutation(120, seed)[:8]
        leaf = theta.clone().requires_grad_()
        loss = twin.losses(leaf, x[index], y[index]).mean()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    found = torch.stack(gradients)
    found = found - torch.outer(found @ u, u)
    # As examples would have it: batches are drawn without replacement.
    expected = 8 * 119 / 112 * float(found.var(0).sum())
    few = dict(directions=2, complement_examples=0, heterogeneity_draws=0)
    # The 15 batches of one order know their variance to a third or so.
    assert float(point_force(twin, path, 0.4, ForceSettings(**few)).noise.sum()) == pytest.approx(
        expected, rel=0.4
    )
    across = torch.linalg.qr(torch.stack([u, *torch.randn(2, len(u)).to(u)], 1)).Q[:, 1:]
    in_order = GradientNoise(twin, theta, u[:, None], across)
    assert float(in_order.variances.sum()) > 1.7 * expected  # single classes


def test_one_update_with_batch_statistics_has_no_noise_left():
    """The noise along the path of a single update is all of the first order."""
    obj, path = sorted_classes()
    settings = ProjectedSGD(0.05, 8, project_every=1, steps=1)
    still = noiseless_drift(obj, path, [0.3, 0.7], settings)
    run = measure_drift(obj, path, [0.3, 0.7], settings, replicas=5)
    torch.testing.assert_close(run.velocity, still[:, None].expand(-1, 5), rtol=1e-6, atol=1e-9)
    assert run.raw.std(1).min() > 100 * run.velocity.std(1).max()
    plain = measure_drift(obj, path, [0.3, 0.7], settings, replicas=5, control=False)
    torch.testing.assert_close(plain.velocity, run.raw)
    assert plain.order_error.tolist() == [0.0, 0.0]


def test_the_mean_of_one_orders_batches_has_its_error_in_the_interval():
    obj, path = sorted_classes()
    settings = ProjectedSGD(0.05, 8, project_every=1, steps=1)
    x, y = obj.tensors()
    twin, slopes = obj.with_norm("batch"), []
    for seed in range(4000):
        index = permutation(120, seed)[:8]
        leaf = path.point(0.4).requires_grad_()
        loss = twin.losses(leaf, x[index], y[index]).mean()
        slopes.append(float(torch.autograd.grad(loss, leaf)[0] @ path.tangent(0.4)))
    slopes = torch.tensor(slopes).double()
    truth, error = -slopes.mean() / path.length, slopes.std() / path.length
    run = measure_drift(obj, path, [0.4], settings, replicas=5)
    found = run.interval(0, 0.99)
    assert found.low < truth < found.high
    # 15 batches in one order of 120 examples.
    assert float(run.order_error) == pytest.approx(float(error) / 15**0.5, rel=0.5)
    assert run.interval(0).high - run.interval(0).low == pytest.approx(
        2 * 1.96 * float(run.order_error), rel=1e-3
    )


def test_curvature_with_batch_statistics_is_of_whole_batches():
    obj, path = sorted_classes()
    twin = obj.with_norm("batch").with_data(obj.tensors(), batch_size=8)
    few = dict(directions=2, complement_examples=0, heterogeneity_draws=0)
    point = point_force(twin, path, 0.4, ForceSettings(max_examples=17, **few))  # 17 = 2 * 8 + 1
    expected = point_force(twin, path, 0.4, ForceSettings(max_examples=16, **few))
    torch.testing.assert_close(point.stiffness, expected.stiffness)


@pytest.mark.parametrize("norm", ["eval", "batch"])
def test_samples_of_the_rest_have_its_covariance_where_few_examples_make_it(norm):
    obj, path = sorted_classes()
    x, y = obj.tensors()
    obj = obj.with_data((torch.cat([x[:110], 30 * x[110:]]), y))
    if norm == "batch":
        obj = obj.with_norm("batch").with_data(obj.tensors(), batch_size=4)
    theta, u = path.point(0.4), path.tangent(0.4)[:, None]
    across = torch.linalg.qr(torch.cat([u, torch.randn(len(u), 2).to(u)], 1)).Q[:, 1:]
    noise = GradientNoise(obj, theta, u, across)
    whole = noise.sample(noise.count, 0)
    assert whole.shape[1] == noise.count and len(set(whole.norm(dim=0).tolist())) > 10
    exact = whole @ whole.T / noise.count
    assert float(exact.trace()) == pytest.approx(noise.complement, rel=1e-9)
    draws = [noise.sample(6, seed) for seed in range(400)]
    torch.testing.assert_close(draws[0].square().sum(0), draws[0].new_full((6,), noise.complement))
    assert float((noise.basis.T @ draws[0]).abs().max()) < 1e-9 * noise.complement**0.5
    probe = torch.randn(len(u), dtype=torch.float64)
    forms = torch.stack([(probe @ columns).square().mean() for columns in draws])
    error = float(forms.std()) / len(forms) ** 0.5
    assert abs(float(forms.mean()) - float(probe @ exact @ probe)) < 4.5 * error
    assert error < 0.05 * float(probe @ exact @ probe)
    assert noise.sample(6, 7).equal(noise.sample(6, 7))


@pytest.mark.parametrize(("size", "shape"), [(32, (3, 3)), (16, (7, 1)), (None, (1, 7))])
def test_samples_of_the_rest_are_dealt_out_to_parts_of_the_data(size, shape):
    obj, path = sorted_classes()
    (inputs, targets), theta = obj.tensors(), path.point(0.4)
    vectors = torch.randn(len(theta), 7, dtype=torch.float64)
    forms = forms_by_parts(obj, theta, vectors, size)
    assert forms.shape == shape and int(forms.isfinite().sum()) == 7
    for column, v in enumerate(vectors.T):
        place, part = divmod(column, len(forms))
        some = slice(part * size, (part + 1) * size) if size else slice(None)
        alone = HessianOperator(obj.with_data((inputs[some], targets[some])), theta)
        expected = float(v @ (alone @ v[:, None])[:, 0])
        assert float(forms[part, place]) == pytest.approx(expected, rel=1e-9)


def test_with_batch_statistics_parts_are_whole_batches():
    obj, path = sorted_classes()
    twin = obj.with_norm("batch").with_data(obj.tensors(), batch_size=8)
    vectors = torch.randn(path.num_params, 3, dtype=torch.float64)
    found = forms_by_parts(twin, path.point(0.4), vectors, 17)  # 17 = 2 * 8 + 1
    assert found.equal(forms_by_parts(twin, path.point(0.4), vectors, 16))
    assert len(found) == 3


def test_the_error_of_a_mean_of_parts_covers_what_a_part_shares():
    """Values whose rows share as much as they have of their own; the known mean is 0."""
    shares = torch.randn(4000, 6, 1, generator=torch.Generator().manual_seed(0)).double()
    own = torch.randn(4000, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    found = [mean_of_parts(values) for values in shares + own]
    means, errors = torch.tensor(found).double().T
    truth = (1 / 6 + 1 / 24) ** 0.5
    assert float(means.std()) == pytest.approx(truth, rel=0.05)
    assert float(errors.square().mean().sqrt()) == pytest.approx(truth, rel=0.05)
    assert mean_of_parts(torch.tensor([[2.0]]))[0] == 2.0
    assert mean_of_parts(torch.tensor([[2.0]]))[1] != mean_of_parts(torch.tensor([[2.0]]))[1]


def test_a_slope_with_errors_in_both_is_not_drawn_toward_zero():
    rng = np.random.default_rng(0)
    truth = np.array([-1.0, 0.5, 2.0, 1.0, -0.3])
    size, inside, fits, plain = 0.5, 0, [], []
    for _ in range(300):
        x = truth + size * rng.standard_normal(5)
        y = truth + 0.3 * rng.standard_normal(5)
        errors = np.full(5, size), np.full(5, 0.3)
        slope, low, high = slope_with_errors(x, errors[0], y, errors[1], 3.84)
        inside += low <= 1 <= high
        fits.append(slope)
        plain.append(x @ y / (x @ x))
    assert np.median(plain) < 0.9 and abs(np.median(fits) - 1) < 0.06
    assert inside >= 270  # 285 of 300 in expectation
    x = np.ones(2)
    assert slope_with_errors(x, 0 * x + 9, x, x, 3.84)[1:] == (-np.inf, np.inf)
