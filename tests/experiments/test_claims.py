"""Each claim on tables whose answer is known."""

import csv
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from entropic_fast._utils.table import Table
from entropic_fast.experiments._pipeline import evaluate_claims
from entropic_fast.experiments.claims import FAILS, HOLDS, UNDECIDED, UNTESTED, Claim, to_json


def test_no_tables_no_claims(tmp_path):
    assert evaluate_claims(tmp_path) == []


# -- figure 1 ------------------------------------------------------------------------------


def ring(cold, hot, expected=None):
    n = len(cold)
    stiffness = np.linspace(1.0, 9.0, n)
    return Table(
        {
            "temperature": [0.0] * n + [0.25] * n,
            "stiffness": np.tile(stiffness, 2),
            "count": np.concatenate((cold, hot)),
            "expected": np.concatenate(
                (np.full(n, sum(cold) / n), hot if expected is None else expected)
            ),
        }
    )


def test_the_ring_holds_where_counts_follow_the_expected_density(judge):
    hot = np.linspace(800, 200, 8).astype(int)
    found = judge(fig1_ring=ring([500, 510, 490, 500, 505, 495, 500, 500], hot))
    assert [found[n].verdict for n in ("uniform at T = 0", "analytic density at T > 0")] == [
        HOLDS
    ] * 2
    gather = found["concentrates where curvature is low"]
    flat, stiff = hot[:2], hot[-2:]
    assert gather.verdict == HOLDS
    assert gather.effect == pytest.approx(flat.mean() / stiff.mean())
    # log of a ratio of Poisson counts: variance 1/a + 1/b
    half = 1.959964 * np.sqrt(1 / flat.sum() + 1 / stiff.sum())
    assert np.log([gather.low, gather.high]) == pytest.approx(
        np.log(gather.effect) + np.array([-half, half]), rel=1e-6
    )


def test_the_ring_fails_where_they_do_not(judge):
    cold = [900, 100, 500, 500, 500, 500, 500, 500]
    found = judge(fig1_ring=ring(cold, [200, 300, 400, 500, 600, 700, 750, 800], [500] * 8))
    assert {c.verdict for c in found.values()} == {FAILS}
    chi2, p = stats.chisquare(cold)
    assert f"chi-square {chi2:.1f} on 7 degrees" in found["uniform at T = 0"].detail
    assert found["uniform at T = 0"].effect == pytest.approx(np.sqrt(chi2 / sum(cold)))
    assert p < 0.01


def test_even_counts_do_not_decide_where_particles_gather(judge):
    found = judge(fig1_ring=ring([5] * 8, [5] * 8))
    assert found["concentrates where curvature is low"].verdict == UNDECIDED


@pytest.mark.parametrize(
    ("moved", "error", "verdict"), [(1.0, 0.1, HOLDS), (-1.0, 0.1, FAILS), (0.1, 0.1, UNDECIDED)]
)
def test_the_ridge_is_judged_by_its_drift(judge, moved, error, verdict):
    table = Table(
        {"time": [0.0, 1.0, 2.0], "mean": [3.0, 3.2, 3 + moved], "std_error": [0, 1, error]}
    )
    claim = judge(fig1_ridge=table)["drifts to the broad side"]
    assert claim.verdict == verdict and claim.effect == pytest.approx(moved)
    assert (claim.low, claim.high) == pytest.approx(stats.norm.interval(0.95, moved, error))


# -- figure 2 ------------------------------------------------------------------------------

NAMES = (
    "Hessian trace rises inside",
    "Fisher trace rises inside",
    "largest eigenvalue rises inside",
)


def curvature(*profiles, error=0.01):
    rows = [
        {
            "path": f"0-{i}-s0",
            "s": s,
            "loss": v,
            "hessian_trace": v,
            "hessian_trace_std_error": error,
            "fisher_trace": v / 2,
            "fisher_trace_std_error": error / 2,
            "top_eigenvalue": v / 10,
            "top_eigenvalue_residual": error / 10,
        }
        for i, values in enumerate(profiles)
        for s, v in zip(np.linspace(0, 1, len(values)), values, strict=True)
    ]
    return Table.from_rows(rows)


def test_curvature_rises_if_it_does_on_every_path(judge):
    found = judge(fig2_curvature=curvature([1, 2, 2, 1], [1, 3, 5, 1], [2, 5, 5, 2]))
    ratios = np.array([2.0, 4.0, 2.5])
    interval = stats.t.interval(0.95, 2, np.log(ratios).mean(), stats.sem(np.log(ratios)))
    for name in NAMES:
        claim = found[name]
        assert claim.verdict == HOLDS and claim.effect == pytest.approx(stats.gmean(ratios))
        assert np.log([claim.low, claim.high]) == pytest.approx(interval)
        assert "3 of 3 paths" in claim.detail


def test_one_path_on_which_curvature_falls_is_enough_to_fail(judge):
    found = judge(fig2_curvature=curvature([1, 2, 2, 1], [4, 3, 3, 4]))
    assert {found[n].verdict for n in NAMES} == {FAILS}


def test_a_rise_within_its_own_error_is_undecided(judge):
    found = judge(fig2_curvature=curvature([1, 1.2, 1.2, 1], error=0.5))
    assert {found[n].verdict for n in NAMES} == {UNDECIDED}


def test_a_mean_below_zero_gives_no_ratio(judge):
    found = judge(fig2_curvature=curvature([-1, 2, 2, -1], [1, 2, 2, 1]))
    claim = found[NAMES[0]]
    assert claim.verdict == UNDECIDED and claim.effect == pytest.approx(2)
    assert "1 without a ratio" in claim.detail
    found = judge(fig2_curvature=curvature([1, -2, -2, 1]))
    assert found[NAMES[0]].verdict == UNDECIDED and np.isnan(found[NAMES[0]].effect)


def losses(*pairs):
    rows = [
        {"path": f"p{i}", "kind": kind, "s": s, "loss": v}
        for i, both in enumerate(pairs)
        for kind, values in zip(("path", "line"), both, strict=True)
        for s, v in zip(np.linspace(0, 1, len(values)), values, strict=True)
    ]
    return Table.from_rows(rows)


def test_loss_is_judged_by_the_share_of_the_straight_lines_barrier(judge):
    low = ([0.1, 0.12, 0.1], [0.1, 2.1, 0.1])
    claim = judge(fig2_loss=losses(low, low))["loss stays far under the straight line's"]
    assert claim.verdict == HOLDS and claim.effect == pytest.approx(0.01)
    high = ([0.1, 0.5, 0.1], [0.1, 2.1, 0.1])
    claim = judge(fig2_loss=losses(low, high))["loss stays far under the straight line's"]
    assert claim.verdict == FAILS


def test_a_line_without_a_barrier_decides_nothing(judge):
    flat = ([0.1, 0.1, 0.1], [0.1, 0.05, 0.1])
    claim = judge(fig2_loss=losses(flat))["loss stays far under the straight line's"]
    assert claim.verdict == UNDECIDED and "1 of them left out" in claim.detail
    low = ([0.1, 0.12, 0.1], [0.1, 2.1, 0.1])
    claim = judge(fig2_loss=losses(low, flat))["loss stays far under the straight line's"]
    assert claim.verdict == HOLDS and claim.effect == pytest.approx(0.01)


def spectrum(inside, ranks=40, floor=0.0):
    rows = [
        {
            "path": "p",
            "s": s,
            "rank": r,
            "eigenvalue": factor / r**2,
            "above_floor": factor / r**2 > floor,
        }
        for s, factor in ((0.0, 1.0), (0.5, inside), (1.0, 1.0))
        for r in range(1, ranks + 1)
    ]
    return Table.from_rows(rows)


def test_the_spectrum_is_judged_rank_by_rank_above_the_floor(judge):
    claim = judge(fig2_spectrum=spectrum(3.0))["the whole spectrum shifts up"]
    assert claim.verdict == HOLDS
    assert (claim.low, claim.effect, claim.high) == pytest.approx((3, 3, 3))
    assert judge(fig2_spectrum=spectrum(0.5))["the whole spectrum shifts up"].verdict == FAILS
    claim = judge(fig2_spectrum=spectrum(3.0, floor=1 / 100.5))["the whole spectrum shifts up"]
    assert "of 10 ranks" in claim.detail and "100.0 % at s = 0.5" in claim.detail
    claim = judge(fig2_spectrum=spectrum(3.0, floor=9.0))["the whole spectrum shifts up"]
    assert claim.verdict == UNDECIDED and "no rank" in claim.detail


def test_a_spectrum_that_crosses_at_one_position_does_not_shift_up(judge):
    both = spectrum(9.0).rows() + [{**row, "s": 0.7} for row in spectrum(1.0).where(s=0.5).rows()]
    for row in both:
        if row["s"] == 0.7:  # higher at low ranks, lower at high ones
            row["eigenvalue"] = 3.0 / row["rank"] ** 3
    claim = judge(fig2_spectrum=Table.from_rows(both))["the whole spectrum shifts up"]
    assert claim.verdict == FAILS and claim.effect > 1
    assert "100.0 % at s = 0.5, 5.0 % at s = 0.7" in claim.detail


# -- figures 3 and 4 -----------------------------------------------------------------------


class Runs:
    """Rows of a relaxation table; a replica is its positions, one every ten updates."""

    def __init__(self):
        self.rows, self.count, self.replicas = [], 0, Counter()

    def add(self, positions, panel="A", **settings):
        start = positions[0]
        values = {"optimizer": "sgd", "lr": 0.1, "batch_size": 16, "project_every": 15, **settings}
        setting = (panel, start, *values.values())
        for i, p in enumerate(positions):
            self.rows.append(
                {
                    "panel": panel,
                    "run": self.count,
                    "replica": self.replicas[setting],
                    "start": start,
                    **values,
                    "step": 10 * i,
                    "position": p,
                }
            )
        self.count += 1
        self.replicas[setting] += 1
        return self

    @property
    def table(self):
        return Table.from_rows(self.rows)


PEAK = curvature([1, 2, 3, 2, 1])  # of curvature, at the middle
NAN = float("nan")


def decays(start, rate, noise=0.0, steps=20):
    end = start + noise
    return [start, *(end * np.exp(-rate * i) for i in range(1, steps))]


def test_deeper_starts_take_longer_if_they_arrive_later(judge):
    runs = Runs()
    for start in (0.1, 0.2, 0.3, 0.4):
        for noise in (-0.001, 0.0, 0.001):
            runs.add(decays(start, 0.2, noise))
    found = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)
    claim = found["deeper starts take longer"]
    assert claim.verdict == HOLDS and claim.effect > 0.95 and claim.low > 0
    assert "12 of 12 replicas" in claim.detail
    down = found["drifts down the curvature"]
    assert down.effect == 1.0 and "4 of 4 starts" in down.detail
    # Four starts of four: Clopper and Pearson's interval reaches below one half.
    assert (down.low, down.verdict) == (pytest.approx(0.025 ** (1 / 4)), UNTESTED)
    assert "4 starts, 6 are needed" in down.detail


def test_deeper_starts_that_arrive_earlier_fail_it(judge):
    runs = Runs()
    for start, steps in ((0.1, 9), (0.2, 6), (0.3, 3), (0.4, 1)):
        for noise in (-0.001, 0.0, 0.001):
            runs.add([start] * steps + [0.05 + noise] * (20 - steps))
    claim = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)["deeper starts take longer"]
    assert claim.verdict == FAILS and claim.effect == pytest.approx(-1)


def test_both_ends_count_as_ends(judge):
    runs = Runs()
    for start in (0.1, 0.2, 0.7, 0.6):
        for noise in (-0.001, 0.0, 0.001):
            p = np.array(decays(min(start, 1 - start), 0.2, noise))
            runs.add(list(p if start < 0.5 else 1 - p))
    claim = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)["deeper starts take longer"]
    assert claim.verdict == HOLDS and claim.effect > 0.95


def test_where_nothing_moves_nothing_is_decided(judge):
    runs = Runs()
    for start in (0.1, 0.3):
        for _ in range(3):
            runs.add([start] * 5)
    found = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)
    verdicts = {n: c.verdict for n, c in found.items() if n not in NAMES}
    assert verdicts.pop("deeper starts take longer") == UNDECIDED
    assert set(verdicts.values()) == {UNTESTED}
    assert "0 of 0 starts" in found["drifts down the curvature"].detail


def test_eight_starts_that_drift_down_hold_and_up_fail(judge):
    starts = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    for sign, verdict, effect in ((-1, HOLDS, 1.0), (1, FAILS, 0.0)):
        runs = Runs()
        for start in starts:
            for noise in (0.001, 0.002, 0.003):
                runs.add([start, start + sign * (0.03 + noise)])
        claim = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)["drifts down the curvature"]
        interval = stats.binomtest(8 if effect else 0, 8).proportion_ci(0.95)
        assert (claim.verdict, claim.effect) == (verdict, effect)
        assert (claim.low, claim.high) == pytest.approx((interval.low, interval.high))


def test_diverged_replicas_are_left_out_and_mentioned(judge):
    runs = Runs()
    for start in (0.1, 0.2, 0.3, 0.4):
        for noise in (-0.001, 0.0, 0.001):
            runs.add(decays(start, 0.2, noise))
        runs.add([start, NAN, NAN])
    found = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)
    deeper, down = found["deeper starts take longer"], found["drifts down the curvature"]
    assert deeper.verdict == HOLDS and deeper.effect > 0.95
    assert "12 of 12 replicas" in deeper.detail and "4 diverged replicas left out" in deeper.detail
    assert down.effect == 1.0 and "4 diverged replicas left out" in down.detail


def test_a_negative_trace_is_no_direction(judge):
    runs = Runs().add([0.3, 0.2]).add([0.3, 0.21])
    found = judge(fig3_relaxation=runs.table, fig2_curvature=curvature([-1, -2, -3, -2, -1]))
    assert found["drifts down the curvature"].verdict == UNTESTED


def test_a_drift_that_is_the_losss_too_is_said_to_be(judge):
    runs = Runs().add([0.3, 0.2]).add([0.3, 0.21])
    found = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)["drifts down the curvature"]
    assert "at 1 of them the loss falls the same way" in found.detail


def test_few_arrivals_decide_nothing(judge):
    runs = Runs()
    for start in (0.1, 0.2, 0.3):
        for noise in (-0.001, 0.0, 0.001):
            runs.add(decays(0.1, 0.2, noise) if start == 0.1 else [start] * 20)
    claim = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)["deeper starts take longer"]
    assert claim.verdict == UNDECIDED and "3 of 9 replicas" in claim.detail


def test_speed_is_per_effective_time_and_ends_at_the_end_of_the_path(judge):
    runs = Runs()
    for noise in (0.0, 0.001):  # twice as far at four times the rate: half the speed
        runs.add([0.4, 0.4 - 0.1 - noise], "C", lr=0.1)
        runs.add([0.4, 0.4 - 0.2 - noise], "C", lr=0.4)
    found = judge(fig3_relaxation=runs.table, fig2_curvature=PEAK)
    assert found["larger learning rates relax faster"].effect == pytest.approx(0.1)
    assert found["larger learning rates relax faster per effective time"].effect < 0


def panel(panel_name, fast, slow, **settings):
    runs = Runs()
    for key, values in settings.items():
        for value, moves in zip(values, (fast, slow), strict=True):
            for move in moves:
                runs.add([0.2, 0.2 - move], panel_name, **{key: value})
    return runs.table


FAST, SLOW = (0.05, 0.06, 0.055, 0.07), (0.01, 0.012, 0.008)


@pytest.mark.parametrize(
    ("letter", "name", "key", "values"),
    [
        ("B", "smaller batches relax faster", "batch_size", (4, 64)),
        ("C", "larger learning rates relax faster", "lr", (0.2, 0.01)),
        ("D", "rarer projections relax faster", "project_every", (50, 5)),
    ],
)
@pytest.mark.parametrize(
    ("fast", "slow", "verdict"),
    [(FAST, SLOW, HOLDS), (SLOW, FAST, FAILS), (FAST, FAST[::-1], UNDECIDED)],
)
def test_settings_are_compared_replica_by_replica(
    judge, letter, name, key, values, fast, slow, verdict
):
    table = panel(letter, fast, slow, **{key: values})
    claim = judge(fig3_relaxation=table, fig2_curvature=PEAK)[name]
    # Without the partners, a replica says nothing of noise that both settings share.
    both = list(zip(fast, slow, strict=False))
    expected = stats.ttest_rel(*zip(*both, strict=True)).confidence_interval(0.95)
    assert claim.verdict == verdict
    assert claim.effect == pytest.approx(np.mean([a - b for a, b in both]))
    assert (claim.low, claim.high) == pytest.approx((expected.low, expected.high))


def test_optimizers_are_compared_with_sgd_without_the_diverged(judge):
    runs = Runs()
    for name, moves in (("sgd", SLOW), ("nesterov", FAST), ("adam", (NAN, NAN, 0.05))):
        for move in moves:
            runs.add([0.2, 0.2 - move], "4", optimizer=name)
    found = judge(fig4_optimizers=runs.table)
    assert found["nesterov relaxes faster"].verdict == HOLDS
    adam = found["adam relaxes faster"]
    assert adam.verdict == UNDECIDED and "2 diverged replicas left out" in adam.detail
    assert np.isnan(adam.effect) and to_json([adam])[0]["effect"] is None


def test_settings_of_which_there_is_one_make_no_claim(judge):
    table = panel("B", FAST, SLOW, batch_size=(8, 8))
    found = judge(fig3_relaxation=table, fig2_curvature=PEAK)
    assert "smaller batches relax faster" not in found


# -- figure 5 ------------------------------------------------------------------------------


def instability(rows):
    names = ("seed", "k", "barrier", "loss_instability", "eigenvalue_instability")
    return Table.from_rows([dict(zip(names, row, strict=True)) for row in rows])


GOOD = [
    (seed, k, barrier + 0.01 * seed, loss + 0.1 * seed, eigen - 0.05 * seed)
    for seed in range(3)
    for k, barrier, loss, eigen in ((0, 2.0, 5.0, 1.0), (4, 0.5, 1.0, 2.0), (8, 0.0, 0.0, 1.0))
]
LMC = ("the barrier falls with k", "loss leads at small k", "curvature leads at large k")


def test_connectivity_holds_where_the_barrier_falls_and_curvature_leads_late(judge):
    found = judge(fig5_instability=instability(GOOD))
    assert [found[n].verdict for n in LMC] == [HOLDS] * 3
    assert found[LMC[0]].effect == pytest.approx(2.0) and "-0.9" in found[LMC[0]].detail
    values = np.array([5 - 1 + 0.15 * seed for seed in range(3)])
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    lead = found[LMC[1]]
    assert lead.effect == pytest.approx(values.mean())
    assert (lead.low, lead.high) == pytest.approx((interval.low, interval.high))
    late = np.array([1 - 0.15 * seed for seed in range(3)])  # mean over k = 4 and 8
    interval = stats.ttest_1samp(late, 0).confidence_interval(0.95)
    assert (found[LMC[2]].low, found[LMC[2]].high) == pytest.approx((interval.low, interval.high))


def test_connectivity_fails_where_it_is_the_other_way_round(judge):
    reversed_k = sorted((seed, 8 - k, *rest) for seed, k, *rest in GOOD)
    assert judge(fig5_instability=instability(reversed_k))[LMC[0]].verdict == FAILS
    swapped = [(seed, k, b, eigen, loss) for seed, k, b, loss, eigen in GOOD]
    found = judge(fig5_instability=instability(swapped))
    assert [found[n].verdict for n in LMC] == [HOLDS, FAILS, FAILS]


@pytest.mark.parametrize("trunks", [1, 2])
def test_claims_of_fewer_trunks_than_three_are_not_tested(judge, trunks):
    found = judge(fig5_instability=instability(GOOD[: 3 * trunks]))
    assert {c.verdict for c in found.values()} == {UNTESTED}
    assert all(f"{trunks} trunks, 3 are needed" in c.detail for c in found.values())


def test_the_effect_of_one_trunk_has_no_interval(judge):
    found = judge(fig5_instability=instability(GOOD[:3]))
    assert found[LMC[0]].effect == pytest.approx(2.0) and np.isnan(found[LMC[0]].low)


def test_an_instability_without_a_value_is_left_out_and_mentioned(judge):
    rows = [(s, k, b, NAN if (s, k) == (0, 0) else lo, e) for s, k, b, lo, e in GOOD]
    claim = judge(fig5_instability=instability(rows))["loss leads at small k"]
    assert claim.verdict == HOLDS and claim.effect == pytest.approx(4.225)
    assert "2 trunks, 1 without a value left out" in claim.detail


def test_one_branching_epoch_decides_nothing_of_the_barrier(judge):
    found = judge(fig5_instability=instability([row for row in GOOD if row[1] == 4]))
    assert found[LMC[0]].verdict == UNDECIDED


def test_json_has_null_for_what_is_not_a_number():
    claim = Claim("1", "n", "s", "m", float("inf"), float("nan"), 1.0, HOLDS, "d")
    (row,) = to_json([claim])
    assert (row["effect"], row["low"], row["high"]) == (None, None, 1.0)


# -- files from elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_tables_of_other_content_are_claims_or_one_readable_error(tiny_run, tmp_path, seed):
    """Cells, columns and lines of a run's tables changed, repeated or left out at random."""
    rng = random.Random(seed)
    shutil.copytree(tiny_run.path / "data", tmp_path / "data")
    for file in rng.sample(sorted((tmp_path / "data").glob("*.csv")), 4):
        with open(file, newline="") as text:
            lines = list(csv.reader(text))
        for _ in range(rng.randint(1, 3)):
            kind = rng.choice(["cell", "header", "lines", "column"])
            column = rng.randrange(len(lines[0]))
            if kind == "cell" and len(lines) > 1:
                cells = ["", "nan", "inf", "x", "9" * 30, "-1", "0", "1e999", "True"]
                rng.choice(lines[1:])[column] = rng.choice(cells)
            elif kind == "header":
                lines[0][column] = rng.choice(["", "s", "x", lines[0][0]])
            elif kind == "lines":
                lines = lines[: rng.randrange(len(lines)) + 1] + lines[-1:]
            elif len(lines[0]) > 1:
                lines = [line[:column] + line[column + 1 :] for line in lines]
        with open(file, "w", newline="") as text:
            csv.writer(text).writerows(lines)
    try:
        found = evaluate_claims(tmp_path / "data")
    except ValueError as error:
        assert "expected the columns and numbers of a finished run in each" in str(error)
        assert ".csv" in str(error)
    else:
        assert all(claim.verdict in (HOLDS, FAILS, UNDECIDED, UNTESTED) for claim in found)
