"""Survival analysis of relaxation times against hand computation and known distributions."""

import math

import numpy as np
import pytest
import torch

from entropic_fast.dynamics import fit_scaling, kaplan_meier, log_rank
from entropic_fast.dynamics._relaxation import Interval, RelaxationTime

NOTHING = Interval(0.0, 0.0, 0.0, 0.95, torch.zeros(1), "")


def relaxed(times, censored):
    return RelaxationTime(
        torch.as_tensor(times, dtype=torch.float64),
        torch.as_tensor(censored, dtype=torch.bool),
        NOTHING,
        False,
        1.0,
        NOTHING,
    )


def drawn(scale, n, seed, shape=1.0, horizon=math.inf):
    rng = np.random.default_rng(seed)
    times = scale * rng.weibull(shape, n)
    return relaxed(np.minimum(times, horizon), times > horizon)


def test_the_survival_is_the_product_of_shares_left_at_each_arrival():
    # 7 replicas: arrivals at 1, 2, 2, 4, 6; censored at 2 (after the arrivals there) and at 5.
    km = kaplan_meier(relaxed([1, 2, 2, 2, 4, 5, 6], [0, 0, 0, 1, 0, 1, 0]))
    assert km.table["time"].tolist() == [1, 2, 4, 6]
    expected = np.cumprod([6 / 7, 4 / 6, 2 / 3, 0 / 1])
    assert km.table["survival"] == pytest.approx(expected)
    assert (km.median, km.arrived, km.replicas) == (4.0, 5, 7)
    # Greenwood's variance of the log-log survival at time 2.
    s = 4 / 7
    greenwood = 1 / (7 * 6) + 2 / (6 * 4)
    half = 1.959964 * math.sqrt(greenwood) / abs(math.log(s))
    low, high = (s ** math.exp(sign * half) for sign in (1, -1))
    assert (km.table["low"][1], km.table["high"][1]) == pytest.approx((low, high), rel=1e-4)
    assert km.low <= km.median <= km.high


def test_where_few_arrive_the_median_is_unbounded():
    km = kaplan_meier(relaxed([1, 5, 5, 5], [0, 1, 1, 1]))
    assert math.isinf(km.median) and math.isinf(km.high)
    none = kaplan_meier(relaxed([5, 5], [1, 1]))
    assert (none.arrived, none.table.num_rows) == (0, 0) and math.isinf(none.low)


def test_intervals_of_the_median_cover_it():
    truth, covered = math.log(2), 0
    for seed in range(400):
        km = kaplan_meier(drawn(1.0, 30, seed, horizon=1.2))
        covered += km.low <= truth <= km.high
    assert 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / 400) < covered / 400


def test_log_rank_finds_what_is_faster_and_nothing_else():
    fast, slow = drawn(1.0, 40, 1, horizon=2.0), drawn(3.0, 40, 2, horizon=2.0)
    statistic, p = log_rank(slow, fast)
    assert p < 1e-3
    assert log_rank(fast, slow)[0] == pytest.approx(-statistic)
    p = [log_rank(drawn(1.0, 20, s), drawn(1.0, 20, s + 1000))[1] for s in range(300)]
    assert abs(np.mean(np.asarray(p) < 0.1) - 0.1) < 4.5 * math.sqrt(0.09 / 300)
    late = relaxed([5, 5], [1, 1])
    assert log_rank(late, late) == (0.0, 1.0)


def paired(seed, n, ratio=1.0, own=0.3, horizon=3.0):
    """Times of two settings whose replicas share most of their noise."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    both = [np.exp(shared + own * rng.normal(size=n)) for _ in range(2)]
    both[1] *= ratio
    return [relaxed(np.minimum(t, horizon), t > horizon) for t in both]


@pytest.mark.parametrize("n", [9, 20])
def test_the_paired_log_rank_test_holds_its_level_and_sees_what_shared_noise_hides(n):
    p = [log_rank(*paired(s, n), paired=True)[1] for s in range(120)]
    assert np.mean(np.asarray(p) < 0.1) < 0.1 + 4.5 * math.sqrt(0.09 / 120)
    assert 0.35 < np.mean(p) < 0.65
    slower = [paired(s, n, ratio=1.7) for s in range(20)]
    found = [[log_rank(b, a, paired=how)[1] for a, b in slower] for how in (True, False)]
    assert np.median(found[0]) < 0.05 < np.median(found[1])
    statistic, p = log_rank(slower[0][1], slower[0][0], paired=True)
    again = log_rank(*slower[0], paired=True)
    assert statistic < 0 and again == (pytest.approx(-statistic), p)


def test_scores_are_those_of_the_log_rank_test_and_pairs_must_be_pairs():
    a, b = relaxed([1, 2, 4], [0, 1, 0]), relaxed([2, 3, 4], [0, 0, 1])
    # By hand: the hazard grows by 1/6 at 1, 1/5 at 2, 1/3 at 3, 1/2 at 4.
    hazard = np.cumsum([1 / 6, 1 / 5, 1 / 3, 1 / 2])
    difference = np.array([1 - hazard[0] - (1 - hazard[1]), -hazard[1] - (1 - hazard[2]), 1.0])
    expected = difference.sum() / np.linalg.norm(difference)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1)
    p = np.mean(np.abs(difference @ signs) >= abs(difference.sum()) - 1e-12)
    assert log_rank(a, b, paired=True) == (pytest.approx(expected), p)
    assert log_rank(a, a, paired=True) == (0.0, 1.0)
    with pytest.raises(ValueError, match="b: expected 3 times"):
        log_rank(a, relaxed([1.0], [0]), paired=True)


def test_the_scaling_with_lr_batch_and_k_is_recovered_under_censoring():
    groups = []
    for i, (lr, b, k) in enumerate(
        [(0.1, 4, 15), (0.2, 4, 15), (0.1, 16, 15), (0.2, 8, 5), (0.05, 4, 30)]
    ):
        rate = 3.0 * lr**1.5 / b * k**0.5
        values = {"lr": lr, "batch_size": float(b), "k": float(k)}
        groups.append((values, drawn(1 / rate, 60, i, shape=1.7, horizon=40.0)))
    found = fit_scaling(groups, 0.999)
    assert found.replicas > found.arrived
    for exponent, low, high in zip((1.5, -1.0, 0.5), found.low, found.high, strict=True):
        assert low < exponent < high
    assert max(found.std_errors) < 0.25
    assert abs(found.shape - 1.7) < 3.3 * found.shape_error < 0.7
    assert abs(found.intercept - math.log(3.0)) < 1.5
    # Times in other tasks change the intercept alone.
    scaled = [(v, relaxed(10 * f.times, f.censored)) for v, f in groups]
    again = fit_scaling(scaled, 0.999)
    assert again.exponents == pytest.approx(found.exponents, rel=1e-3)
    assert again.intercept == pytest.approx(found.intercept - math.log(10), abs=1e-3)
    assert "lr^(1." in str(found)


def test_standard_errors_are_those_of_repeated_experiments():
    estimates, errors = [], []
    for seed in range(60):
        groups = [
            ({"lr": lr}, drawn(lr**-2.0, 25, 100 * seed + i, horizon=6.0))
            for i, lr in enumerate((0.5, 1.0, 2.0))
        ]
        found = fit_scaling(groups)
        estimates.append(found.exponents[0])
        errors.append(found.std_errors[0])
    assert abs(np.mean(estimates) - 2.0) < 4 * np.std(estimates) / 60**0.5 + 0.02
    assert 0.65 < np.mean(errors) / np.std(estimates) < 1.5


def test_noise_that_settings_share_makes_exponents_surer_and_the_errors_say_so():
    estimates, shared, alone = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        noise = rng.exponential(size=25)  # of each replica, the same at every rate
        groups = []
        for lr in (0.5, 1.0, 2.0):
            times = noise * rng.uniform(0.8, 1.2, 25) / lr**2
            groups.append(({"lr": lr}, relaxed(np.minimum(times, 6.0), times > 6.0)))
        found = fit_scaling(groups, replicas=[range(25)] * 3)
        estimates.append(found.exponents[0])
        shared.append(found.std_errors[0])
        alone.append(fit_scaling(groups).std_errors[0])
        assert found.high[0] - found.exponents[0] > 2.06 * found.std_errors[0]  # t, 24 degrees
    assert 0.65 < np.mean(shared) / np.std(estimates) < 1.5
    assert np.mean(alone) > 2.5 * np.std(estimates)


def quasi_separated():
    """As in the demo: replicas arrive at the two fastest settings alone."""
    none = relaxed([900.0] * 10, [True] * 10)
    some = relaxed([795.0, 810.0, 840.0, 870.0, 885.0, 885.0] + [900.0] * 4, [0] * 6 + [1] * 4)
    most = relaxed([420.0, 500.0, 555.0, 600.0, 690.0, 690.0, 700.0, 795.0, 800.0, 900.0],
                   [0] * 9 + [1])  # fmt: skip
    points = [(0.1, 4, 15), (0.1, 16, 15), (0.03, 8, 15), (0.15, 8, 15), (0.1, 8, 5), (0.1, 8, 50)]
    times = [some, none, none, most, none, none]
    names = ("lr", "batch_size", "project_every")
    return [
        (dict(zip(names, map(float, point), strict=True)), found)
        for point, found in zip(points, times, strict=True)
    ]


def test_exponents_that_the_data_do_not_determine_are_said_to_be_not_identifiable():
    groups = quasi_separated()
    for replicas in (None, [range(10)] * len(groups)):
        found = fit_scaling(groups, replicas=replicas)
        assert not found.identifiable and str(found).startswith("not identifiable: no replica")
        assert "at 4 of 6 settings" in found.reason and found.arrived == 15
        assert np.isnan([*found.exponents, *found.std_errors, found.shape]).all()
    # Arrivals at every setting determine them; so do those of settings that span the others.
    arrived = [(values, drawn(800.0, 10, i)) for i, (values, _) in enumerate(groups)]
    assert fit_scaling(arrived).identifiable
    one_late = [*arrived, ({"lr": 0.1, "batch_size": 8.0, "project_every": 15.0}, groups[1][1])]
    assert fit_scaling(one_late).identifiable


def test_a_setting_without_arrivals_does_not_spoil_one_exponent():
    none = relaxed([1.0] * 10, [True] * 10)
    groups = [({"lr": lr}, drawn(lr**-2.0, 40, i)) for i, lr in enumerate((1.0, 2.0))]
    found = fit_scaling([({"lr": 0.1}, none), *groups])
    assert found.identifiable and abs(found.exponents[0] - 2.0) < 5 * found.std_errors[0]


def test_clusters_must_be_of_the_times():
    groups = [({"lr": a}, drawn(1.0, 3, i)) for i, a in enumerate((1.0, 2.0))]
    with pytest.raises(ValueError, match="replicas: expected"):
        fit_scaling(groups, replicas=[[0, 1, 2]])
    with pytest.raises(ValueError, match="replicas: expected at least two"):
        fit_scaling(groups, replicas=[[1, 1, 1]] * 2)


def test_bad_groups_are_refused():
    good = drawn(1.0, 10, 0)
    for groups in (
        [],
        [({"lr": 0.1}, good)],
        [({"lr": 0.1}, good), ({"b": 0.2}, good)],
        [({"lr": 0.1}, good), ({"lr": 0.2}, relaxed([0.0], [1]))],
        [({"lr": a, "b": a}, good) for a in (1.0, 2.0, 3.0)],
        [({"lr": a}, relaxed([1.0], [1])) for a in (1.0, 2.0)],
    ):
        with pytest.raises(ValueError, match="groups: expected"):
            fit_scaling(groups)
    with pytest.raises(ValueError, match="lr: expected"):
        fit_scaling([({"lr": 0.0}, good)])
    with pytest.raises(ValueError, match="confidence: expected"):
        kaplan_meier(good, 1.5)
