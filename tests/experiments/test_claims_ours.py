"""Claims of figures 6 to 9 on tables made up for them."""

import numpy as np
import pytest

from entropic_fast._utils.table import Table
from entropic_fast.experiments.claims import FAILS, HOLDS, UNDECIDED

LINE = Table({"point": [0.0, 0.5, 1.0], "loss": [0.1, 0.1, 0.1], "eigenvalue": [1.0, 3.0, 1.0]})


def tracks(moves, starts=(0.25, 0.5), replicas=6):
    """Replicas that move toward the nearest end by `moves[batch size]`, give or take a little."""
    rows, run = [], 0
    for size, move in moves.items():
        for start in starts:
            for replica in range(replicas):
                noise = 0.001 * (replica - replicas / 2)
                for step, share in ((0, 0.0), (100, 1.0)):
                    position = start + share * (noise + np.sign(start - 0.5) * move)
                    rows.append(
                        {
                            "run": run,
                            "replica": replica,
                            "start": start,
                            "lr": 0.1,
                            "batch_size": size,
                            "step": step,
                            "position": position,
                        }
                    )
                run += 1
    return Table.from_rows(rows)


@pytest.mark.parametrize(
    ("moves", "verdict"),
    [({4: 0.1, 16: 0.02}, HOLDS), ({4: 0.02, 16: 0.1}, FAILS), ({4: 0.02, 16: 0.02}, UNDECIDED)],
)
def test_drift_on_a_line_is_held_against_that_at_the_largest_batch(judge, moves, verdict):
    (claim,) = judge(fig8_line=LINE, fig8_relaxation=tracks(moves, (0.25, 0.75, 0.5))).values()
    assert (claim.figure, claim.verdict) == ("8", verdict)
    assert claim.effect == pytest.approx(moves[4] - moves[16], abs=1e-9)
    assert "at most 3.00 of the ends' mean" in claim.detail


def test_one_batch_size_or_replicas_that_all_diverged_decide_nothing(judge):
    (claim,) = judge(fig8_line=LINE, fig8_relaxation=tracks({4: 0.1})).values()
    assert claim.verdict == UNDECIDED and np.isnan(claim.effect)
    lost = tracks({4: 0.1, 16: 0.1})
    position = np.where(lost["step"] > 0, np.nan, lost["position"])
    gone = Table({name: position if name == "position" else lost[name] for name in lost.columns})
    (claim,) = judge(fig8_line=LINE, fig8_relaxation=gone).values()
    assert claim.verdict == UNDECIDED


def bad_minimum(judge, accuracy=0.8, barrier=0.01, traces=(1.0, 0.5, 3.0), away=0.1, line=1.0):
    minima = Table(
        {
            "minimum": ["normal", "bad"],
            "test_images": [400, 400],
            "kept_accuracy": [1.0, 1.0],
            "test_accuracy": [0.95, accuracy],
        }
    )
    s = [0.0, 0.5, 1.0]
    loss = Table(
        {
            "kind": ["path"] * 3 + ["line"] * 3,
            "s": s + s,
            "loss": [0.1, 0.1 + barrier, 0.1, 0.1, 0.1 + line, 0.1],
        }
    )
    curvature = Table(
        {"s": s, "hessian_trace": list(traces), "hessian_trace_std_error": [0.01] * 3}
    )
    return judge(
        fig9_minima=minima,
        fig9_loss=loss,
        fig9_curvature=curvature,
        fig9_relaxation=tracks({4: -away}, (0.9, 0.99)),
    )


def test_a_minimum_that_is_worse_sharper_joined_and_left(judge):
    found = bad_minimum(judge)
    assert [claim.verdict for claim in found.values()] == [HOLDS] * 4
    assert found["the bad minimum generalizes worse"].effect == pytest.approx(0.15)
    assert found["the bad minimum is joined to a normal one"].effect == pytest.approx(0.01)
    assert found["the bad minimum is sharper"].effect == pytest.approx(3.0)
    assert found["SGD leaves the bad minimum"].effect == pytest.approx(0.1005, abs=1e-3)
    assert "s = 0.99" in found["SGD leaves the bad minimum"].measure


@pytest.mark.parametrize(
    ("change", "name", "verdict"),
    [
        ({"accuracy": 0.95}, "the bad minimum generalizes worse", UNDECIDED),
        ({"accuracy": 1.0}, "the bad minimum generalizes worse", FAILS),
        ({"barrier": 0.5}, "the bad minimum is joined to a normal one", FAILS),
        ({"barrier": 0.5, "line": 0.05}, "the bad minimum is joined to a normal one", UNDECIDED),
        ({"traces": (3.0, 1.0, 1.0)}, "the bad minimum is sharper", FAILS),
        ({"away": -0.1}, "SGD leaves the bad minimum", FAILS),
        ({"away": 0.0}, "SGD leaves the bad minimum", UNDECIDED),
    ],
)
def test_each_claim_can_fail(judge, change, name, verdict):
    assert bad_minimum(judge, **change)[name].verdict == verdict


def test_other_networks_have_figure_fives_claims_under_their_own_names(judge):
    rows = [
        {"seed": s, "k": k, "barrier": b, "loss_instability": i, "eigenvalue_instability": e}
        for s in (0, 1, 2)
        for k, b, i, e in ((0, 1.0 + 0.01 * s, 9.0, 1.0), (8, 0.1, 0.1, 1.0 + 0.01 * s))
    ]
    found = judge(fig6_instability=Table.from_rows(rows), fig7_instability=Table.from_rows(rows))
    assert len(found) == 6 and {claim.verdict for claim in found.values()} == {HOLDS}
    assert {claim.figure for claim in found.values()} == {"6B", "6D", "7B", "7D"}
    assert all(f"(figure {claim.figure[0]})" in name for name, claim in found.items())
