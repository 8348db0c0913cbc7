"""The claims of the force on tables whose answer is known."""

import numpy as np
import pytest

from entropic_fast._utils.table import Table
from entropic_fast.experiments.claims import FAILS, HOLDS, UNDECIDED
from entropic_fast.experiments.figures import force as fig_force

FORCE = (
    "drift follows the predicted force",
    "shuffled curvature does not predict the drift",
    "no force at k = 1",
    "no force without noise",
    "the force has the predicted size",
)


def force_tables(slope=1.0, at_one=0.0, without=0.0, noise=0.2, seed=0):
    """Comparison and bursts at 8 positions where measured = slope x predicted + noise."""
    rng = np.random.default_rng(seed)
    s = (np.arange(8) + 0.5) / 8
    predicted = np.array([-1.0, -2.0, -4.0, -1.5, 0.5, 3.0, 2.0, 1.0])
    rows, bursts = [], []
    for k, a, replicas in ((15, slope, 32), (1, at_one, 8)):
        for position, x in zip(s, predicted, strict=True):
            values = a * x + noise * rng.standard_normal(replicas)
            bursts += [
                {"k": k, "position": position, "replica": r, "residual": v}
                for r, v in enumerate(values)
            ]
            energetic = 5.0 + without * x + 0.01 * rng.standard_normal()
            rows.append(
                {
                    "k": k,
                    "position": position,
                    "residual": values.mean(),
                    "std_error": values.std(ddof=1) / np.sqrt(replicas),
                    "measured": values.mean() + energetic,
                    "predicted_exclusion": 0.0,
                    "energetic": energetic,
                    "gradient": 5.0,
                    "predicted_entropic": x if k == 15 else 0.0,
                    "predicted_error": 0.2 if k == 15 else 0.0,
                    "predicted_radial": 0.25 * x,
                    "replicas": replicas,
                    "noise_share": 0.9,
                    "squared_distance": 1.2,
                    "predicted_squared_distance": 1.0,
                }
            )
    comparison, bursts = Table.from_rows(rows), Table.from_rows(bursts)
    return {
        "force_comparison": comparison,
        "force_fit": fig_force.fits(comparison, bursts),
        "force_shares": fig_force.shares(comparison, bursts),
    }


def test_shares_of_the_drift_add_up_and_controls_are_not_parts_of_it():
    table = force_tables(at_one=0.0)["force_shares"]
    share = {row["part"]: row["share"] for row in table.rows()}
    parts = table.where(kind="part")
    assert parts["share"].sum() == pytest.approx(1, abs=1e-9)
    assert share["norm growth"] == pytest.approx(share["entropic"] / 3)
    assert abs(share["unexplained"]) < 0.02 < share["entropic"] and share["k = 1"] > 0.8
    assert table.where(kind="control")["part"].tolist() == ["shuffled", "k = 1"]
    assert (table["low"] <= table["high"]).all()


def test_the_force_holds_where_drift_follows_the_prediction(judge):
    found = judge(**force_tables(slope=0.8))
    assert [found[n].verdict for n in FORCE] == [HOLDS] * 5
    claim = found[FORCE[0]]
    assert claim.low < 0.8 < claim.high < 1 and "does not hold 1" in claim.detail
    assert "norm growth of scale-invariant weights is 25 %" in claim.detail
    assert "predicted one at 8 of 8 positions" in claim.detail
    assert "at 0 of 8" in judge(**force_tables(slope=-0.8))[FORCE[0]].detail
    assert "holds 1" in judge(**force_tables(noise=1.0))[FORCE[0]].detail


@pytest.mark.parametrize(
    ("changes", "name", "verdict"),
    [
        ({"slope": -0.5}, FORCE[0], FAILS),
        ({"slope": 0.0, "noise": 3.0}, FORCE[0], UNDECIDED),
        ({"slope": 0.0, "noise": 3.0, "seed": 1}, FORCE[1], UNDECIDED),
        ({"at_one": 0.9}, FORCE[2], FAILS),
        ({"at_one": -0.9}, FORCE[2], FAILS),
        ({"at_one": 0.5}, FORCE[2], UNDECIDED),
        ({"without": 0.9}, FORCE[3], FAILS),
        ({"without": 0.5}, FORCE[3], UNDECIDED),
        ({"without": -0.9}, FORCE[3], FAILS),
        ({"slope": 0.1}, FORCE[4], FAILS),
        ({"slope": 3.0}, FORCE[4], FAILS),
        ({"slope": 0.5}, FORCE[4], UNDECIDED),
    ],
)
def test_the_force_is_judged_by_its_slopes(judge, changes, name, verdict):
    assert judge(**force_tables(**changes))[name].verdict == verdict


def test_the_size_allows_for_the_predictions_own_errors(judge):
    tables = force_tables(slope=0.8)
    claim = judge(**tables)["the force has the predicted size"]
    base = tables["force_comparison"].where(k=15)
    share = 0.2 * 8**0.5 / np.linalg.norm(base["predicted_entropic"])
    assert f"errors are {share:.2g} of them" in claim.detail
    exact = judge(**tables)["drift follows the predicted force"]
    assert f"; {exact.effect:.2f} if predictions are taken for exact" in claim.detail
    assert claim.high - claim.low > 1.5 * (exact.high - exact.low)
    assert claim.low < 0.8 < claim.high
