"""`entropic-fast check` on the emulated GPU: right there, and what is wrong is named."""

from __future__ import annotations

import json

import emulated_gpu
import torch

from entropic_fast._torch import cuda_graphs
from entropic_fast.curvature.hvp import _cuda_graphs as tile_graphs
from entropic_fast.selfcheck import _networks as networks
from entropic_fast.selfcheck import _speeds as speeds
from entropic_fast.selfcheck._samples import SAMPLES

WITH_GRAPHS = {"repeated products", "repeated quadratic forms", "AutoNEB", "relaxation"}


def test_all_is_well_on_the_emulated_gpu(command, tmp_path):
    file = tmp_path / "check.json"
    ended = command("check", "--device", "emulated", "--quick", "--json", file)
    assert ended.code == 0, ended.out + ended.err
    found = json.loads(file.read_text())
    assert found["facts"]["devices"] == ["emulated:0"]
    places = {(c["name"], c["against"]) for c in found["checks"] if c["device"] == "emulated:0"}
    assert places >= {(name, "the float64 reference") for name in SAMPLES}
    assert places >= {(name, "the CPU") for name in networks.CALCULATIONS}
    graphs = {c["name"]: c["graphs"] for c in found["checks"] if c["device"] == "emulated:0"}
    assert {name for name, said in graphs.items() if said == "captured"} == WITH_GRAPHS
    assert "CUDA graphs" in ended.out and "captured" in ended.out


def test_it_is_said_why_no_graphs_ran(monkeypatch):
    monkeypatch.setenv(cuda_graphs.VARIABLE, "0")
    found = networks.check_networks([torch.device("emulated:0")], [torch.float32])
    said = {check.name: check.graphs for check in found if check.ok and check.graphs}
    assert set(said) == WITH_GRAPHS
    assert set(said.values()) == {"CUDA graphs were not used: ENTROPIC_FAST_CUDA_GRAPHS=0"}


def test_a_graph_that_reads_other_vectors_is_named(monkeypatch):
    """Replays of the products' graphs, and no other product."""
    load = tile_graphs.TileGraphs._load

    def stale(self, rows, total):
        buffers = load(self, rows, total)
        if self.captures and buffers is not None:
            buffers[0].mul_(1.001)
        return buffers

    monkeypatch.setattr(tile_graphs.TileGraphs, "_load", stale)
    found = networks.check_networks([torch.device("emulated:0")], [torch.float32])
    wrong = {check.name for check in found if not check.ok}
    assert wrong == {"repeated products", "repeated quadratic forms"}


def test_speeds_are_in_full_float32_but_for_one_line_that_says_so(monkeypatch):
    tiny = speeds.Sizes("resnet8-w8", 4, 2**16, 64, 8, 64, 1000, 64)
    low = {}
    timed = speeds._timed

    def watched(work, device):
        before = emulated_gpu.reduced_precision.total()
        seconds = timed(work, device)
        low[work] = emulated_gpu.reduced_precision.total() - before
        return seconds

    works = {}
    for make in ("_network", "_kernels", "_edges"):
        monkeypatch.setattr(speeds, make, recording(getattr(speeds, make), works))
    monkeypatch.setattr(speeds, "_timed", watched)
    _, rows = speeds.measure(torch.device("emulated:0"), tiny, rounds=1)
    assert not [row for row in rows if row.problem]
    assert [name for name, work in works.items() if low[work]] == [speeds.AS_TORCH_IS_SET]
    found = {row.name: row for row in rows}
    assert found[speeds.GRADIENT].gradients == 1 and found[speeds.GRADIENT].arithmetic > 0
    assert found[speeds.AS_TORCH_IS_SET].gradients > 0
    assert found["Hessian product, a column"].arithmetic > 0


def recording(make, works):
    def made(*arguments):
        found = make(*arguments)
        works.update(found)
        return found

    return made


def test_a_result_that_differs_from_the_cpus_is_named(monkeypatch):
    def off(obj):
        norms = networks.norms(obj)
        return norms * (1 + 1e-3 * (obj.device.type == "emulated"))

    monkeypatch.setattr(networks, "CALCULATIONS", {"gradient norms": off})
    checks = networks.check_networks([torch.device("emulated:0")], [torch.float32])
    wrong = [(check.name, check.against) for check in checks if not check.ok]
    assert wrong == [("gradient norms", "the CPU"), ("gradient norms", "gradients one by one")]
