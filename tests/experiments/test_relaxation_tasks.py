import math
import shutil

import numpy as np
import pytest
from rich.console import Console

from entropic_fast._utils.table import Table
from entropic_fast.experiments import _pipeline as stages
from entropic_fast.experiments._config import with_overrides
from entropic_fast.experiments._executor import execute
from entropic_fast.experiments._run_folder import RunFolder
from entropic_fast.experiments.figures import _relaxation_runs as relaxation
from entropic_fast.experiments.figures.fig3 import _tasks as fig3


@pytest.fixture
def run(tiny_run, tmp_path):
    return RunFolder.open(shutil.copytree(tiny_run.path, tmp_path / "run"))


def starts(run):
    return fig3._midpoints(run)[1::2]  # the demo's start_every


def test_panels_share_their_noise_and_hold_what_was_asked(run):
    table = relaxation.collect(run, ["A", "C"])
    a, c = table.where(panel="A"), table.where(panel="C")
    assert set(a["start"]) == set(starts(run)) and len(set(a["lr"])) == 1
    assert set(c["lr"]) == set(run.config.relax.lrs) and len(set(c["start"])) == 1
    assert np.unique(table["run"]).tolist() == list(range(2 * (4 + 4)))
    assert np.allclose(table["effective_time"], table["lr"] * table["step"])
    # The scan's rate is panel A's rate, its start one of panel A's: the same trajectory.
    rate, start = float(a["lr"][0]), float(c["start"][0])
    both = [p.where(lr=rate, start=start)["position"] for p in (a, c)]
    assert np.array_equal(*both) and len(both[0]) == 2 * 3


def test_what_the_scan_has_is_not_run_again(run, monkeypatch):
    expected = {
        task: run.table(f"relax/{task}", "trajectory").rows()
        for task in ("A", f"B-{run.config.relax.batch_size}")
    }
    ran = []

    def spy(*arguments):
        ran.append((arguments[2], len(arguments[4])))
        return whole(*arguments)

    whole = relaxation.run_replicas
    monkeypatch.setattr(relaxation, "run_replicas", spy)
    again = fig3.relax_starts(run, lambda _: None)["trajectory"]
    assert again.rows() == expected["A"]
    assert ran == [("relax/A", (len(starts(run)) - 1) * run.config.relax.replicas)]
    size = run.config.relax.batch_size
    again = fig3.relax_batch(run, lambda _: None, size)["trajectory"]
    assert again.rows() == expected[f"B-{size}"] and len(ran) == 1
    # A panel that has to run all of it itself finds the same, but for rounding.
    monkeypatch.setattr(fig3, "_start", lambda _: 2.0)
    alone = fig3.relax_starts(run, lambda _: None)["trajectory"]
    assert ran[1][1] == len(starts(run)) * run.config.relax.replicas
    assert alone.num_rows == len(expected["A"])
    found = [float(row["position"]) for row in expected["A"]]
    np.testing.assert_allclose(alone["position"], found, atol=1e-3)


def test_a_setting_at_which_every_replica_diverges_is_recorded_and_the_run_goes_on(
    run, monkeypatch
):
    monkeypatch.setattr(fig3, "optimizer_rate", lambda _: 1e30)
    todo = [u for u in fig3.tasks(run) if u.name == "relax/sgd"]
    (run.task_folder("relax/sgd") / "done.json").unlink()
    execute(run, todo, workers=1, console=Console(quiet=True))
    table = run.table("relax/sgd", "trajectory")
    assert table.num_rows == 4 and set(table["step"]) == {0, 30}
    assert np.isfinite(table.where(step=0)["position"]).all()
    assert np.isnan(table.where(step=30)["position"]).all()
    stages.write_report(run, Console(quiet=True))
    assert "2 diverged replicas left out" in (run.path / "report.html").read_text()


def test_a_scan_in_which_every_replica_diverges_takes_the_largest_rate(run, monkeypatch):
    lost = with_overrides(run.config, ["relax.lr=0.0", "relax.lrs=[1e30, 2e30]"])
    found = fig3.scan_rates(RunFolder(run.path, lost), lambda _: None)
    assert found["choice"]["lr"] == 2e30 and "at none of" in found["choice"]["why"]
    assert np.isnan(found["trajectory"].where(step=30)["position"]).all()


def test_a_task_that_was_interrupted_goes_on_from_its_checkpoint(run, monkeypatch):
    before = run.table("relax/A", "trajectory").rows()
    monkeypatch.setattr(relaxation, "CHECKPOINT_CYCLES", 1)
    checkpoint = run.task_folder("relax/A") / "run.safetensors"

    def stop(fraction):
        if fraction == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fig3.relax_starts(run, stop)
    assert checkpoint.exists()
    fractions = []
    again = fig3.relax_starts(run, fractions.append)["trajectory"]
    assert fractions == [1] and not checkpoint.exists()
    assert again.rows() == before
    # One of another path, or no checkpoint at all, is computed anew.
    checkpoint.write_bytes(b"nothing of the kind")
    assert fig3.relax_starts(run, fractions.append)["trajectory"].rows() == before


def test_the_rate_asked_for_is_taken_and_otherwise_the_rule_says_why(run):
    assert fig3._choose(None, 0.25) == {
        "lr": 0.25,
        "why": "learning rate 0.25 as configured",
    }
    assert fig3.chosen_rate(run) in run.config.relax.lrs
    said = fig3.notes(run)[0]
    assert "at none of" in said or "lowest of" in said
    assert math.isclose(fig3.optimizer_rate(run), run.config.relax.optimizer_lr)


def test_relaxation_times_count_updates_and_say_who_is_missing():
    steps = [0, 10, 20, 30]

    def rows(run, start, positions):
        return [
            {
                "panel": "A",
                "run": run,
                "optimizer": "sgd",
                "start": start,
                "lr": 0.1,
                "batch_size": 8,
                "project_every": 5,
                "step": s,
                "position": p,
            }
            for s, p in zip(steps, positions, strict=True)
        ]

    table = Table.from_rows(
        [
            *rows(0, 0.2, [0.2, 0.15, 0.09, 0.0]),
            *rows(1, 0.2, [0.2, 0.09, 0.05, 0.0]),
            *rows(2, 0.2, [0.2, 0.15, 0.12, 0.1]),
            *rows(3, 0.9, [0.9, 0.9, 0.9, 0.9]),
        ]
    )
    near, far = relaxation.times(table).rows()
    assert near["median_updates"] == pytest.approx(20)
    assert (near["arrived"], near["replicas"], near["lower_bound"]) == (3, 3, False)
    assert (near["low"], near["high"]) == (pytest.approx(10), pytest.approx(30))
    assert (far["arrived"], far["lower_bound"]) == (0, True)
    assert far["median_updates"] == pytest.approx(30)
