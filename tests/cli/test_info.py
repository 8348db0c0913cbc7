"""`entropic-fast info` says what runs where."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from entropic_fast.cli._info import render
from entropic_fast.ops import backend
from entropic_fast.selfcheck import collect
from entropic_fast.selfcheck._facts import NOT_TIMED


def test_facts_are_plain_and_complete() -> None:
    facts = json.loads(json.dumps(collect()))
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["backends"]["projected_step"]["cpu"] == backend.backend_for(
        "projected_step", "cpu"
    )
    assert facts["cpu"]["isa"] in facts["cpu"]["runnable_isas"]
    assert facts["cpu"]["torch_threads"] == torch.get_num_threads()
    assert "portable" in facts["build"]["isas"]


def test_families_never_timed_on_a_gpu_say_so(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(backend, "TIMED_ON_GPU", frozenset({"projected_step"}))
    notes = collect()["notes"]
    assert "projected_step" not in notes and notes["norm_act_tangents"] == NOT_TIMED
    assert set(notes) | {"projected_step"} == set(backend.families())
    console = Console(record=True, width=120)
    render(console)
    rows = {r.split()[1]: r for r in console.export_text().splitlines() if r.count("│") == 5}
    assert NOT_TIMED in rows["norm_act_tangents"] and NOT_TIMED not in rows["projected_step"]


def test_timings_on_a_gpu_are_recorded() -> None:
    """No family counts as timed whose record is not there."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    recorded = [file.stem for file in results.glob("*.json") if "gpu" in file.stem]
    assert all(any(name in stem for stem in recorded) for name in backend.TIMED_ON_GPU)


def test_page_names_versions_build_and_backends() -> None:
    console = Console(record=True, width=120)
    render(console)
    text = console.export_text()
    for expected in (
        "Versions",
        "Compiled",
        "instruction set",
        "OpenMP",
        "projected_step",
        torch.__version__,
    ):
        assert expected in text


def test_forced_backend_that_cannot_run_is_shown_not_raised(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(backend.VARIABLE, "fortran")
    facts = collect()
    assert "expected one of" in facts["backend"]
    assert "expected one of" in facts["backends"]["projected_step"]["cpu"]


def test_backends_that_are_there_and_fail_are_shown_with_the_reason(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backend, "_absent", lambda name: None)
    reasons = {"triton": "no C compiler", "cuda": "the driver is too old"}
    monkeypatch.setattr(backend, "_failing", reasons.get)
    facts = collect()["backends"]["projected_step"]
    assert facts["cuda"] == "reference (cuda: the driver is too old; triton: no C compiler)"
