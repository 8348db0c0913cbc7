"""The command line on the emulated GPU: every stage up to the report, and profiles of a model."""

from __future__ import annotations

from pathlib import Path

import device_runs
import pytest

from entropic_fast.experiments.figures import _style as plots

# Training rounds as torch does by default, and so do the trials that choose a layout and a plan.
ROUNDS = {"training/_train.py", "_torch/memory_format.py", "experiments/_plan.py"}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures are made and not drawn, which no device has a part in."""

    def save(figure, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")

    monkeypatch.setattr(plots, "save", save)


def test_every_stage_of_a_run(tmp_path, emulated):
    device_runs.run(tmp_path / "gpu", "emulated", "reproduce")
    rounded = {place for place in emulated.reduced_precision if place[0] not in ROUNDS}
    assert not rounded
    device_runs.run(tmp_path / "cpu", "cpu", *device_runs.STAGES)
    device_runs.assert_tables_agree(tmp_path / "gpu" / "tasks", tmp_path / "cpu" / "tasks")
    assert (tmp_path / "gpu" / "report.html").exists()


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one point", "two points"])
def test_profiles_of_a_model(tmp_path, seeds, emulated):
    for device in ("emulated", "cpu"):
        device_runs.profile(tmp_path / device, tmp_path / "code.py", device, seeds)
    assert not emulated.reduced_precision
    device_runs.assert_tables_agree(tmp_path / "emulated", tmp_path / "cpu")
