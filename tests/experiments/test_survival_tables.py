"""Survival tables of figure 3 from trajectories whose arrivals are known."""

import math

import numpy as np

from entropic_fast._utils.table import Table
from entropic_fast.experiments.figures.fig3._survival import survival


def trajectories(times, horizon=3000):
    """Replicas at s = 0.2 until they jump to 0.1, at the update given, in panels B, C and D."""
    rows, run = [], 0
    for panel, lr, size, arrivals, *every in times:
        for replica, arrival in enumerate(arrivals):
            rows += [
                {
                    "panel": panel,
                    "run": run,
                    "replica": replica,
                    "optimizer": "sgd",
                    "start": 0.2,
                    "lr": lr,
                    "batch_size": size,
                    "project_every": every[0] if every else 15,
                    "step": step,
                    "position": 0.1 if step >= arrival else 0.2,
                }
                for step in range(0, horizon + 1, 15)
            ]
            run += 1
    return Table.from_rows(rows)


def arrivals(rate, count, seed):
    return np.random.default_rng(seed).exponential(1 / rate, count)


def test_medians_tests_and_exponents_are_those_of_the_rates():
    settings = [("B", 0.1, 4), ("B", 0.1, 16), ("C", 0.05, 8), ("C", 0.1, 8), ("C", 0.2, 8)]
    rates = [
        (panel, lr, b, arrivals(1.5 * lr**2 / b, 60, i))
        for i, (panel, lr, b) in enumerate(settings)
    ]
    rates += [("D", 0.1, 8, arrivals(1.5 * 0.01 / 8 * (k / 15) ** 0.5, 60, k), k) for k in (5, 60)]
    table, scaling = survival(trajectories(rates))
    assert table["arrived"].max() <= 60 and table["project_every"].tolist() == [15] * 5 + [5, 60]
    by = {(r["panel"], r["lr"], r["batch_size"]): r for r in table.rows()}
    fast = by["B", 0.1, 4]
    assert fast["low"] <= math.log(2) * 4 / (1.5 * 0.01) <= fast["high"]
    assert math.isnan(fast["log_rank_p"]) and by["B", 0.1, 16]["log_rank_p"] < 1e-3
    exponents = {r["setting"]: r for r in scaling.rows()}
    for name, truth in (("lr", 2.0), ("batch_size", -1.0), ("project_every", 0.5)):
        row = exponents[name]
        assert abs(row["exponent"] - truth) < 3.3 * row["std_error"] < 1.2


def test_where_none_arrive_there_is_no_scaling():
    never = [("B", 0.1, 4, [1e9] * 3), ("C", 0.2, 8, [1e9] * 3)]
    table, scaling = survival(trajectories(never, 60))
    assert scaling.num_rows == 0 and table["arrived"].tolist() == [0, 0]
    assert all(math.isinf(v) for v in table["median_updates"])


def test_times_are_in_updates():
    table, _ = survival(trajectories([("B", 0.5, 4, [300, 300, 600])]))
    assert table["median_updates"].tolist() == [300.0]
