"""Energy counters, read from files as Linux has them."""

import pytest

from entropic_fast.experiments import _energy as energy
from entropic_fast.experiments._energy import Energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def write(zone, name, now, most=1000_000_000):
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        for file, text in (("name", name), ("energy_uj", now), ("max_energy_range_uj", most)):
            (folder / file).write_text(f"{text}\n")

    return write


def test_packages_are_counted_and_their_parts_are_not(powercap):
    powercap("intel-rapl:0", "package-0", 5_000_000)
    powercap("intel-rapl:0:0", "core", 1_000_000)
    powercap("intel-rapl:1", "package-1", 1_000_000)
    with Energy() as spent:
        powercap("intel-rapl:0", "package-0", 7_500_000)
        powercap("intel-rapl:0:0", "core", 9_000_000)
    assert spent.joules == {"package-0 (RAPL)": 2.5, "package-1 (RAPL)": 0.0}
    assert spent.seconds >= 0


def test_a_counter_may_begin_anew(powercap):
    powercap("intel-rapl:0", "package-0", 9_000_000, most=10_000_000)
    with Energy() as spent:
        powercap("intel-rapl:0", "package-0", 500_000, most=10_000_000)
    assert spent.joules == {"package-0 (RAPL)": 1.5}


def test_what_cannot_be_read_is_left_out(powercap):
    powercap("intel-rapl:0", "package-0", "nonsense")
    with Energy("cuda") as spent:
        pass
    assert spent.joules == {}
