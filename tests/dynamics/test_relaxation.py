"""Analysis of trajectories, on trajectories whose answers are known by hand."""

import math

import pytest
import torch
from scipy import stats

from entropic_fast.dynamics import (
    Interval,
    Trajectory,
    displacement,
    drift,
    mean_interval,
    median_interval,
    relaxation_time,
)


def trajectory(position, lr=0.1, every=10, diverged_at=None):
    position = torch.as_tensor(position, dtype=torch.float64)
    r, t = position.shape
    empty = torch.zeros_like(position)
    return Trajectory(
        position=position,
        distance=empty,
        loss=empty,
        full_loss=empty,
        steps=every * torch.arange(t),
        lr=torch.as_tensor(lr, dtype=torch.float64).expand(r),
        ids=torch.arange(r),
        diverged_at=torch.as_tensor(diverged_at or [-1] * r),
        optimizer="sgd",
        batch_size=4,
        project_every=every,
        seed=0,
        backend="loop",
    )


@pytest.mark.parametrize("make", [mean_interval, median_interval])
@pytest.mark.parametrize("n", [3, 8, 15])
def test_intervals_cover_the_truth_as_often_as_they_say(make, n):
    g = torch.Generator().manual_seed(n)
    trials, covered = 1500, 0
    for row in torch.randn(trials, n, generator=g, dtype=torch.float64) + 2.0:
        interval = make(row, 0.9)
        covered += interval.low <= 2.0 <= interval.high
        attained = interval.confidence
    error = math.sqrt(attained * (1 - attained) / trials)
    assert abs(covered / trials - attained) < 4.5 * error
    if make is mean_interval:
        assert attained == 0.9
    else:
        assert attained == pytest.approx(0.75) if n == 3 else attained >= 0.9


def test_median_interval_says_what_few_samples_attain():
    four = median_interval(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    assert (four.value, four.low, four.high, four.confidence) == (2.5, 1.0, 4.0, 0.875)
    for make in (mean_interval, median_interval):
        one = make(torch.tensor([3.0]))
        assert (one.value, one.low, one.high) == (3.0, -math.inf, math.inf)
        assert not one.excludes_zero
    for make in (mean_interval, median_interval):
        for bad in ([], [math.nan, 1.0], [[1.0]]):
            with pytest.raises(ValueError, match="samples: expected"):
                make(torch.tensor(bad))
        with pytest.raises(ValueError, match="confidence: expected"):
            make(torch.ones(3), 1.0)


def test_displacement_is_the_end_less_the_start_of_those_that_finished():
    run = trajectory(
        [[0.2, 0.3, 0.25], [0.2, 0.1, 0.35], [0.2, math.nan, math.nan]], diverged_at=[-1, -1, 7]
    )
    moved = displacement(run)
    assert moved.value == pytest.approx(0.1) and len(moved.samples) == 2
    half = stats.t.ppf(0.975, 1) * 0.05
    assert (moved.low, moved.high) == pytest.approx((0.1 - half, 0.1 + half))
    assert not moved.excludes_zero
    assert displacement(run, statistic="median").value == pytest.approx(0.1)
    with pytest.raises(ValueError, match="statistic: expected"):
        displacement(run, statistic="mode")
    with pytest.raises(ValueError, match="trajectory: expected a replica that did not diverge"):
        displacement(run.select([2]))


def test_drift_is_the_slope_against_effective_time_whatever_the_lr():
    lr = torch.tensor([0.1, 0.2, 0.4]).double()
    time = lr[:, None] * 10 * torch.arange(6)
    velocity = torch.tensor([0.01, 0.02, 0.03]).double()
    run = trajectory(0.2 + velocity[:, None] * time, lr=lr)
    measured = drift(run)
    torch.testing.assert_close(measured.samples, velocity)
    assert measured.value == pytest.approx(0.02)
    bent = trajectory(torch.tensor([[0.2, 0.3, 0.4, 0.4, 0.4]] * 2))
    assert drift(bent, last=2.0).value == pytest.approx(0.1)
    assert drift(bent, first=2.0).value == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(ValueError, match="first, last: expected at least 2 records"):
        drift(bent, first=3.5)


def test_relaxation_time_is_the_first_passage_to_the_nearest_end():
    run = trajectory(
        [
            [0.4, 0.3, 0.19, 0.3],  # 0.2 is half-way to 0: third record
            [0.6, 0.9, 0.7, 0.7],  # 0.8 is half-way to 1: second record
            [0.4, 0.2, 0.4, 0.4],  # on the threshold
        ]
    )
    times = relaxation_time(run)
    assert times.times.tolist() == [2.0, 1.0, 1.0] and not bool(times.censored.any())
    assert times.median.value == 1.0 and not times.lower_bound
    assert times.horizon == 3.0 and times.restricted_mean.value == pytest.approx(4 / 3)
    assert relaxation_time(run, target=1.0, fraction=0.7).censored.tolist() == [True, False, True]


def test_replicas_that_do_not_arrive_are_censored_and_bound_the_median_from_below():
    moves, stays = [0.4, 0.3, 0.1, 0.1, 0.1], [0.4] * 5
    some = relaxation_time(trajectory([moves, moves, moves, stays]))
    assert some.times.tolist() == [2, 2, 2, 4] and some.censored.tolist() == [False] * 3 + [True]
    assert some.median.value == 2 and not some.lower_bound
    assert (some.median.low, some.median.high) == (2, math.inf)
    assert some.restricted_mean.value == 2.5 and some.horizon == 4
    most = relaxation_time(trajectory([moves, stays, stays]))
    assert most.lower_bound and most.median.value == 4 and most.median.high == math.inf
    assert str(most).startswith(">= 4") and str(most).endswith("1 of 3 arrived")
    none = relaxation_time(trajectory([stays, stays]))
    assert none.lower_bound and none.median.value == 4 and none.restricted_mean.value == 4


def test_a_replica_that_diverged_is_censored_where_it_was_last_seen():
    nan = math.nan
    run = trajectory(
        [[0.4, 0.3, 0.3, 0.1], [0.4, 0.35, nan, nan], [0.4, 0.1, nan, nan]],
        diverged_at=[-1, 17, 15],
    )
    times = relaxation_time(run)
    assert times.times.tolist() == [3.0, 1.0, 1.0]
    assert times.censored.tolist() == [False, True, False]
    # The lost replica may have been the slowest: the median 1 is only a lower bound.
    assert times.median.value == 1.0 and times.lower_bound
    assert times.horizon == 1.0 and times.restricted_mean.value == 1.0


@pytest.mark.parametrize(
    ("start", "settings", "message"),
    [
        (0.5, {}, "target: expected a position, where a start is half-way"),
        (0.3, dict(target=0.3), "target: expected another position than the start"),
        (0.0, {}, "target: expected another position than the start"),
        (0.3, dict(target=1.5), "target: expected 'nearest' or a position"),
        (0.3, dict(target="end"), "target: expected 'nearest' or a position"),
        (0.3, dict(fraction=1.0), "fraction: expected a number in"),
        (0.3, dict(confidence=95), "confidence: expected a number between"),
    ],
)
def test_questions_without_an_answer_are_refused(start, settings, message):
    with pytest.raises(ValueError, match=message):
        relaxation_time(trajectory([[start, 0.1]]), **settings)


def test_an_interval_prints_what_it_is():
    text = str(Interval(0.2, -0.1, 0.5, 0.95, torch.zeros(4), "mean, Student's t"))
    assert text == "0.2 [-0.1, 0.5] (95 %, mean, Student's t, 4 replicas)"
