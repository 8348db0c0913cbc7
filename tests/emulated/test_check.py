"""`entropic-fast check` on the emulated GPU: right there, and what is wrong is named."""

from __future__ import annotations

import json

import torch

from entropic_fast.selfcheck import networks
from entropic_fast.selfcheck.samples import SAMPLES


def test_all_is_well_on_the_emulated_gpu(command, tmp_path):
    file = tmp_path / "check.json"
    ended = command("check", "--device", "emulated", "--quick", "--json", file)
    assert ended.code == 0, ended.out + ended.err
    found = json.loads(file.read_text())
    assert found["facts"]["devices"] == ["emulated:0"]
    places = {(c["name"], c["against"]) for c in found["checks"] if c["device"] == "emulated:0"}
    assert places >= {(name, "the float64 reference") for name in SAMPLES}
    assert places >= {(name, "the CPU") for name in networks.CALCULATIONS}


def test_a_result_that_differs_from_the_cpus_is_named(monkeypatch):
    def off(obj):
        norms = networks.norms(obj)
        return norms * (1 + 1e-3 * (obj.device.type == "emulated"))

    monkeypatch.setattr(networks, "CALCULATIONS", {"gradient norms": off})
    checks = networks.check_networks([torch.device("emulated:0")], [torch.float32])
    wrong = [(check.name, check.against) for check in checks if not check.ok]
    assert wrong == [("gradient norms", "the CPU"), ("gradient norms", "gradients one by one")]
