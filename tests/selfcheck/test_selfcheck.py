"""`entropic-fast check` finds what is wrong with a machine and names it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from entropic_fast import selfcheck
from entropic_fast.ops import backend
from entropic_fast.ops.gram_update import native as score_gram_native
from entropic_fast.ops.projected_step import native as step_native
from entropic_fast.selfcheck import _networks as networks
from entropic_fast.selfcheck import _ops as ops
from entropic_fast.selfcheck import _samples as samples
from entropic_fast.selfcheck import _speeds as speeds
from entropic_fast.selfcheck import _verdict as verdict

# They call an operator by its number, and no kernel.
OTHERS = {"operator_product", "operator_forms"}
CPU = torch.device("cpu")


def test_no_op_is_left_out():
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.partition("::")[2] for s in schemas if s.name.startswith("entropic_fast::")}
    assert names == set(samples.SAMPLES) | OTHERS
    assert {sample.family for sample in samples.SAMPLES.values()} == set(backend.families())


def test_all_is_well_on_this_machine_and_is_said_and_written(command, tmp_path):
    file = tmp_path / "check.json"
    ended = command("check", "--device", "cpu", "--quick", "--json", file)
    assert ended.code == 0, ended.out + ended.err
    assert "all is well" in ended.out and "norm_act_jvp" in ended.out and "AutoNEB" in ended.out
    found = json.loads(file.read_text())
    assert found["ok"] and found["findings"] == [] and found["advice"] == []
    assert found["facts"]["versions"]["torch"] == torch.__version__ and found["facts"]["commit"]
    checked = {c["name"] for c in found["checks"]}
    assert checked >= set(samples.SAMPLES) | set(networks.CALCULATIONS)
    assert all(0 <= c["error"] <= c["tolerance"] for c in found["checks"])
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_kernel_is_named_with_its_backend_and_what_to_do(command, monkeypatch, tmp_path):
    right = score_gram_native.cross_update_

    def wrong(a):
        right(a)
        a.out[-1, -1] += 1e-3 * float(a.out.norm())

    monkeypatch.setattr(score_gram_native, "cross_update_", wrong)
    monkeypatch.setattr(networks, "check_networks", lambda devices, dtypes: [])
    file = tmp_path / "check.json"
    ended = command("check", "--device", "cpu", "--quick", "--json", file)
    assert ended.code == 1 and "Traceback" not in ended.err
    told = "wrong: gram_cross_update_ (float32) on backend cpp, device cpu: off by 0.001 relative"
    assert told in ended.out
    assert 'entropic_fast.set_backend("reference")' in ended.out
    assert "ENTROPIC_FAST_BACKEND=reference" in ended.out and "bug report" in ended.out
    found = json.loads(file.read_text())
    assert not found["ok"]
    assert {c["name"] for c in found["checks"] if not c["ok"]} == {"gram_cross_update_"}


def test_a_kernel_that_raises_is_a_finding_and_the_rest_is_still_checked(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(step_native, "project_step", broken)
    found = list(ops.check_ops(CPU))
    failed = [check for check in found if not check.ok]
    assert {check.name for check in failed} == {"project_step"} and len(found) > 60
    assert "raised RuntimeError: no kernel image is available" in failed[0].finding()
    assert failed[0].to_dict()["error"] == "inf"
    assert backend.current_backend() == "auto"


def test_backends_that_fail_are_noted_and_a_lost_gpu_is_left_at_once(monkeypatch, command):
    monkeypatch.setitem(
        backend._failed, ("norm_act_tangents", "cpp", "cpu"), "jvp: OSError: no compiler"
    )
    backend._choose.cache_clear()
    monkeypatch.setattr(networks, "check_networks", lambda devices, dtypes: [])

    def lost(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "_results", lambda op, *rest: [] if rest[0] == "reference" else lost())
    ended = command("check", "--device", "cpu", "--quick")
    backend._choose.cache_clear()
    assert ended.code == 1 and "skipped on cpu: cpp: jvp: OSError: no compiler" in ended.out
    assert ended.out.count("wrong: ") == 1 and "illegal memory access" in ended.out


@pytest.fixture
def only_tiny_speeds(monkeypatch):
    tiny = speeds.Sizes("resnet8-w4", 4, 2**16, 64, 8, 64, 1000, 64)
    monkeypatch.setattr(speeds, "CPU", tiny)
    monkeypatch.setattr(speeds, "ROUNDS", 1)
    monkeypatch.setattr(ops, "check_ops", lambda device: [])
    monkeypatch.setattr(networks, "check_networks", lambda devices, dtypes: [])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("sm")])
def test_a_speed_that_cannot_be_measured_is_named_and_nothing_is_wrong(
    command, monkeypatch, only_tiny_speeds, error, tmp_path
):
    def too_large(*arguments):
        raise error

    monkeypatch.setattr(speeds, "score_gram", too_large)
    file = tmp_path / "check.json"
    ended = command("check", "--device", "cpu", "--json", file)
    assert ended.code == 0 and "not to be trusted" not in ended.out
    assert f"not measured: {speeds.GRAM} on cpu: {type(error).__name__}" in ended.out
    rows = {row["name"]: row for row in json.loads(file.read_text())["speeds"]["cpu"]["work"]}
    assert rows[speeds.GRAM]["seconds"] is None and rows[speeds.GRAM]["problem"]
    others = [row for name, row in rows.items() if name != speeds.GRAM]
    assert len(others) == 8 and all(row["seconds"] > 0 for row in others)


@pytest.mark.parametrize("broken", ["_sizes", "_network", "_kernels", "_edges"])
def test_what_cannot_be_set_up_is_not_measured(monkeypatch, only_tiny_speeds, broken):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(speeds, broken, too_large)
    limits, rows = speeds.measure(CPU)
    problems = [row for row in rows if row.problem]
    assert len(problems) == 1 and "out of memory" in problems[0].problem
    assert len(rows) - 1 == {"_sizes": 0, "_network": 3, "_kernels": 6, "_edges": 9}[broken]
    missing = broken in ("_sizes", "_edges")
    assert (limits.bandwidth is None) == missing
    assert all((row.arithmetic or row.bandwidth) is None for row in rows if missing)


def test_counted_products_find_kept_values_as_timed_ones_do(only_tiny_speeds):
    counts = []

    def counted(work):
        with speeds.FlopCounterMode(display=False) as counter:
            work.call()
        return float(counter.get_total_flops())

    for name in ("Hessian product, a column", "trace probe"):
        work = speeds._network(CPU, speeds.CPU)[name]
        found = speeds._warmed(speeds._network(CPU, speeds.CPU)[name])
        counts = [counted(work) for _ in range(5)]
        assert found == counts[2] == counts[3] == counts[4] < counts[1]


def test_each_work_is_warmed_just_before_it_is_timed():
    calls = []
    works = {
        "a": speeds._Work(lambda: calls.append("a")),
        "b": speeds._Work(lambda: calls.append("b") or 2.5, timed=True),
    }
    found = speeds._take_turns(works, CPU, 2, {})
    assert calls == ["a", "a", "b"] * 2 and found["b"] == [2.5, 2.5]


def test_a_wrong_calculation_is_named(monkeypatch):
    def off(obj):
        found = networks.product(obj)
        found[0, 0] += 1e-3 * found.norm()
        return found

    monkeypatch.setitem(networks.CALCULATIONS, "Hessian product", off)
    wrong = [c for c in networks.check_networks([CPU], [torch.float32]) if not c.ok]
    assert [c.name for c in wrong] == ["Hessian product"]
    report = selfcheck.Report({}, wrong)
    assert not report.ok and 'set_backend("reference")' in report.advice()[0]
    assert "device=" not in report.advice()[0]
    report = selfcheck.Report({}, [dataclasses.replace(wrong[0], device="cuda:0")])
    assert 'pass device="cpu"' in report.advice()[0]


def wrong_op(backend, device="cuda:0", message=""):
    check = verdict.Check(
        "op", "norm_act_jvp", backend, device, "float32", "the reference", 1e-5, 1.0
    )
    return check.failed(message) if message else check


def test_advice_names_a_backend_that_runs_there_and_is_right(monkeypatch):
    """Triton may be missing, or be what is wrong; then the reference, or nothing."""
    usable = {"triton", "reference"}
    monkeypatch.setattr(backend, "unusable", lambda name, _: None if name in usable else "absent")
    assert 'set_backend("triton")' in selfcheck.Report({}, [wrong_op("cuda")]).advice()[0]
    assert 'set_backend("reference")' in selfcheck.Report({}, [wrong_op("triton")]).advice()[0]
    both = [wrong_op("triton"), wrong_op("reference")]
    for text in selfcheck.Report({}, both).advice()[:2]:
        assert "set_backend" not in text and 'pass device="cpu"' in text
    usable.discard("triton")
    assert 'set_backend("reference")' in selfcheck.Report({}, [wrong_op("cuda")]).advice()[0]


def test_a_forced_backend_that_cannot_run_is_no_wrong_result(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "fortran")
    with pytest.raises(ValueError, match="ENTROPIC_FAST_BACKEND"):
        selfcheck.run("cpu", quick=True)
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    monkeypatch.setattr(backend, "_unusable_anywhere", lambda name: "absent")
    monkeypatch.setattr(ops, "check_ops", lambda device: [])
    report = selfcheck.run("cpu", quick=True)
    texts = " ".join(report.advice())
    assert not report.ok and "unset ENTROPIC_FAST_BACKEND" in texts
    assert "not to be trusted" not in texts


def test_interpreted_triton_is_checked_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.backends("norm_act_tangents", "cpu") == ["cpp"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for family in backend.families():
        assert ops.backends(family, "cpu") == ["cpp", "triton"]


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_one_wrong_entry_of_a_result_is_found(name, monkeypatch):
    results = ops._results

    def off(op, setting, arguments):
        found = results(op, setting, arguments)
        if setting != "reference":
            number = next((t for t in found if t.is_floating_point() and t.numel()), found[0])
            size = 1e-3 * number.double().norm() if number.is_floating_point() else 1
            number[(-1,) * number.dim()] += size
        return found

    monkeypatch.setattr(ops, "_results", off)
    check = ops._check(name, "cpp", CPU, torch.float32, "odd")
    assert not check.ok and not check.message


def test_relative_errors_count_what_is_not_finite_and_other_shapes():
    a = torch.tensor([3.0, 4.0])
    assert verdict.relative_error(torch.tensor([3.0, 4.5]), a) == pytest.approx(0.1)
    assert verdict.relative_error(a[:1], a) == math.inf
    assert verdict.relative_error(torch.tensor([3.0, math.nan]), a) == math.inf
    assert verdict.relative_error(a, torch.zeros(2)) == math.inf
    assert verdict.relative_error(torch.zeros(0), torch.zeros(0)) == 0
    large = torch.tensor([2**62, 1])
    assert verdict.relative_error(large, large.clone()) == 0
    assert verdict.relative_error(large + 1, large) == math.inf


def test_speeds_are_in_plain_gradients_and_shares(command, only_tiny_speeds, tmp_path):
    file = tmp_path / "check.json"
    ended = command("check", "--device", "cpu", "--json", file)
    assert ended.code == 0, ended.err
    for name in (speeds.GRADIENT, "trace probe", "Hessian product", speeds.GRAM, speeds.UPDATE):
        assert name in ended.out
    found = json.loads(file.read_text())["speeds"]["cpu"]
    assert all(rate > 0 for rate in found["limits"].values())
    rows = {row["name"]: row for row in found["work"]}
    assert rows[speeds.GRADIENT]["gradients"] == 1 and rows[speeds.GRADIENT]["arithmetic"] > 0
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["kernel: projected step"]["bandwidth"] > 0


def test_a_gpu_that_is_not_there_is_refused(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected a GPU that torch can use, got none"):
        selfcheck.run("cuda")
    with pytest.raises(ValueError, match="device: expected one of 'auto', 'cpu', 'cuda'"):
        selfcheck.run("tpu")
    ended = command("check", "--device", "cuda")
    assert ended.code == 1 and "--device" in ended.err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_is_well_on_a_gpu():
    report = selfcheck.run("cuda", quick=True)
    assert report.ok, [check.finding() for check in report.wrong]
    assert {c.backend for c in report.checks if c.kind == "op"} >= {"triton", "reference"}
