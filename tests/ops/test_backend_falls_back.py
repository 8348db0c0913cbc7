"""A GPU backend that is there and fails is found once, said once, and passed over under "auto"."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
import warnings

import pytest
import torch
from random_calls import OPS

from entropic_fast.ops import _gpu_probe as gpu_probe
from entropic_fast.ops import _native as native
from entropic_fast.ops import backend
from entropic_fast.ops.gram_update import symmetric_update_
from entropic_fast.ops.projected_step import adam_step, sgd_step
from entropic_fast.ops.random_bits import streams as random
from entropic_fast.training import models


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No setting, and nothing known or said about this machine."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    for name, empty in (("_failed", {}), ("_guards", {}), ("_warned", set()), ("_forced", None)):
        monkeypatch.setattr(backend, name, empty)
    caches = (backend._choose, gpu_probe.triton_problem, gpu_probe.cuda_problem)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """torch says that there is a GPU; Triton and the compiled module are tried out on it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    built = {"cuda": True, "cuda_archs": ["sm_80", "sm_90", "compute_90"], "cuda_compiler": ""}
    monkeypatch.setattr(native, "build_config", lambda: built)
    monkeypatch.setattr(gpu_probe, "capturing", lambda: False)
    tried = {"triton": [], "cuda": []}
    probe = types.ModuleType("probe")
    probe.probe = tried["triton"].append
    monkeypatch.setitem(sys.modules, "entropic_fast.ops._triton", probe)
    monkeypatch.setattr(gpu_probe, "_run_step", tried["cuda"].append)
    tried["fail triton"] = lambda error: setattr(probe, "probe", raising(error, tried["triton"]))
    return tried


def raising(error, tried):
    def run(device):
        tried.append(device)
        raise error

    return run


def test_backends_that_run_a_trivial_kernel_are_taken_and_tried_once(a_gpu):
    for family in ("projected_step", "norm_act_tangents", "gram_update"):
        expected = "cuda" if family == "projected_step" else "triton"
        assert backend.backend_for(family, "cuda") == expected
        assert backend.backend_for("projected_step", "cuda", "triton") == "triton"
    assert len(a_gpu["triton"]) == len(a_gpu["cuda"]) == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc"),
        (OSError("fatal error: Python.h: No such file or directory"), "install Python's headers"),
        (RuntimeError("Triton Error [CUDA]: unsupported PTX version"), "update the driver"),
        (KeyError("sm_175"), "KeyError"),
    ],
)
def test_a_triton_that_cannot_compile_is_said_once_and_passed_over(a_gpu, error, advice):
    a_gpu["fail triton"](error)
    with pytest.warns(RuntimeWarning, match=f"skips backends that fail on cuda.*{advice}"):
        assert backend.backend_for("norm_act_tangents", "cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.backend_for("projected_step", "cuda") == "cuda"
        assert backend.backend_for("gram_update", "cuda") == "reference"
    assert len(a_gpu["triton"]) == 1
    with pytest.raises(backend.BackendError, match="backend 'triton' cannot run: a trivial kernel"):
        backend.set_backend("triton")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True)],
)
def test_cuda_runs_where_there_is_code_for_the_gpu(a_gpu, monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    reason = backend.unusable("cuda", "cuda")
    if runs:
        assert reason is None
    else:
        assert "holds code for sm_80 sm_90 compute_90" in reason and "capability 7.5" in reason


def test_a_runtime_newer_than_the_driver_is_a_readable_reason(a_gpu, monkeypatch):
    error = RuntimeError("sgd_step: CUDA driver version is insufficient for CUDA runtime version")
    monkeypatch.setattr(gpu_probe, "_run_step", raising(error, []))
    assert "update the driver" in backend.unusable("cuda", "cuda")
    a_gpu["fail triton"](RuntimeError("none"))
    with pytest.warns(RuntimeWarning, match=r"cuda: .*update the driver.*; triton: .*none"):
        assert backend.backend_for("projected_step", "cuda") == "reference"


def test_nothing_is_tried_out_while_a_graph_is_captured(a_gpu, monkeypatch):
    monkeypatch.setattr(gpu_probe, "capturing", lambda: True)
    assert backend.backend_for("projected_step", "cuda") == "cuda"
    assert backend.backend_for("norm_act_tangents", "cuda") == "triton"
    assert a_gpu["triton"] == a_gpu["cuda"] == []


@pytest.mark.parametrize("forced", ["triton", "cuda"])
@pytest.mark.parametrize("by", ["a call", "the environment"])
def test_a_forced_gpu_backend_leaves_the_cpu_to_auto(a_gpu, monkeypatch, forced, by):
    """Random draws, initialization and gradient noise are computed on the CPU by every run."""
    expected = random.rademacher((5, 3), 1)
    if by == "a call":
        backend.set_backend(forced)
    else:
        monkeypatch.setenv(backend.VARIABLE, forced)
    assert backend.current_backend() == forced and backend.setting_for("cpu") == "auto"
    assert backend.backend_for("projected_step", "cuda") == backend.backend_for(
        "random_bits", "cuda"
    )
    assert backend.backend_for("projected_step", "cuda") == forced
    assert torch.equal(random.rademacher((5, 3), 1), expected)
    models.initialize(models.digits_cnn("batch", channels=(2, 2, 2)), 0)
    theta = torch.tensor([1.0, 2.0])
    sgd_step(theta, torch.ones(2), lr=0.5)
    assert theta.tolist() == [0.5, 1.5]
    with pytest.raises(backend.BackendError, match=r"runs on c.*not on cpu|interpreter"):
        backend.backend_for("projected_step", "cpu", forced)
    if forced == "cuda":
        with pytest.raises(
            backend.BackendError, match="'norm_act_tangents' has no such implementation"
        ):
            backend.backend_for("norm_act_tangents", "cuda")
        assert backend.backend_for("norm_act_tangents", "cpu") == "cpp"


def test_a_forced_backend_that_fails_on_the_gpu_raises_for_every_device(a_gpu, monkeypatch):
    a_gpu["fail triton"](OSError("no compiler"))
    monkeypatch.setenv(backend.VARIABLE, "triton")
    for device in ("cuda", "cpu"):
        with pytest.raises(backend.BackendError, match=r"'triton' was asked for.*no compiler"):
            backend.backend_for("projected_step", device)


# ---- first calls ---------------------------------------------------------------------------------


@pytest.fixture
def compiled_late(monkeypatch):
    """Triton takes the family `projected_step` on the CPU, by a module of the test's."""
    module = types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backend.PREFERENCE, "cpu", ("triton", "cpp", "reference"))
    families = {**backend._families["projected_step"], "triton": "late"}
    monkeypatch.setitem(backend._families, "projected_step", families)
    return module


def test_a_first_call_that_fails_is_taken_by_the_next_backend(compiled_late):
    def half_done(a):
        a.theta.add_(100)
        raise RuntimeError("PassManager::run failed")

    compiled_late.sgd_step = half_done
    theta, grad = torch.tensor([1.0, 2.0]), torch.ones(2)
    with pytest.warns(RuntimeWarning, match="triton: sgd_step: RuntimeError: PassManager"):
        sgd_step(theta, grad, lr=0.5)
    assert theta.tolist() == [0.5, 1.5]
    assert backend.backend_for("projected_step", "cpu") == "cpp"
    sgd_step(theta, grad, lr=0.5)
    assert theta.tolist() == [0.0, 1.0]


def test_adams_count_of_steps_is_put_back_too(compiled_late):
    def half_done(a):
        for tensor in (a.theta, a.exp_avg, a.exp_avg_sq, a.step):
            tensor += 7
        raise OSError("no compiler")

    compiled_late.adam_step = half_done
    theta, mean, square = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(2)
    step = torch.zeros(1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="adam_step: OSError: no compiler"):
        adam_step(theta, torch.tensor([3.0, -4.0]), mean, square, step, lr=0.1)
    torch.testing.assert_close(theta, torch.tensor([0.9, 2.1]))
    assert step.tolist() == [1]


def test_errors_that_are_no_fault_of_the_backend_are_raised(compiled_late):
    def too_large(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compiled_late.sgd_step = too_large
    with pytest.raises(torch.OutOfMemoryError):
        sgd_step(torch.ones(2), torch.ones(2), lr=0.5)
    assert backend.backend_for("projected_step", "cpu") == "triton"


def test_a_backend_asked_for_by_name_raises_its_own_error(compiled_late):
    def broken(arguments):
        raise RuntimeError("PassManager::run failed")

    compiled_late.sgd_step = broken
    backend.set_backend("triton")
    with pytest.raises(RuntimeError, match="PassManager"):
        sgd_step(torch.ones(2), torch.ones(2), lr=0.5)


def test_first_calls_are_watched_for_each_dtype_and_later_ones_are_not(compiled_late):
    def works_in_float32(a):
        theta = a.theta
        if theta.dtype == torch.float64 or bool(theta.isnan().any()):
            theta.zero_()
            raise RuntimeError("no float64 here")
        return theta.new_empty(len(theta), 2, 0, dtype=torch.float64)

    compiled_late.sgd_step = works_in_float32
    for _ in range(2):
        sgd_step(torch.ones(2), torch.ones(2), lr=0.5)
    with pytest.raises(RuntimeError, match="no float64 here"):
        sgd_step(torch.full((2,), torch.nan), torch.ones(2), lr=0.5)
    double = torch.ones(2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="no float64 here"):
        sgd_step(double, torch.ones_like(double), lr=0.5)
    assert double.tolist() == [0.5, 0.5] and backend.backend_for("projected_step", "cpu") == "cpp"


# ---- later calls ---------------------------------------------------------------------------------


def triton_error(name, text):
    """An error of a class of Triton's, as of a compilation for other sizes."""
    return type(name, (Exception,), {"__module__": "triton.runtime.errors"})(text)


COMPILERS = [
    triton_error("CompilationError", "at 1:0: unsupported"),
    triton_error("OutOfResources", "out of resource: shared memory, Required: 300000"),
    RuntimeError("PassManager::run failed"),
    subprocess.CalledProcessError(1, "gcc"),
    OSError("[Errno 28] No space left on device"),
]


def works_once(calls, error, result=None, spoils=False):
    """A function that computes nothing at its first call, and fails at the second."""

    def function(arguments):
        first = arguments[0]
        calls.append(tuple(first.shape))
        if len(calls) > 1:
            if spoils:
                first += 100
            raise error
        return None if result is None else result(first)

    return function


@pytest.mark.parametrize("error", COMPILERS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("size", [2, 3])
def test_a_kernel_that_cannot_be_compiled_later_falls_back(compiled_late, monkeypatch, error, size):
    """A function of one launch, so nothing has been written, whatever its sizes."""
    families = {**backend._families["gram_update"], "triton": "late"}
    monkeypatch.setitem(backend._families, "gram_update", families)
    calls = []
    compiled_late.symmetric_update_ = works_once(calls, error)
    first, gram = (torch.zeros(2, 2, dtype=torch.float64) for _ in range(2))
    symmetric_update_(first, torch.ones(2, 4))
    gram = torch.zeros(size, size, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=f"symmetric_update_: {type(error).__name__}"):
        symmetric_update_(gram, torch.ones(size, 4))
    assert len(calls) == 2
    assert torch.equal(gram, torch.full_like(gram, 4).tril())
    assert backend.backend_for("gram_update", "cpu") == "cpp"


@pytest.mark.parametrize("error", COMPILERS, ids=lambda error: type(error).__name__)
def test_a_later_launch_of_an_update_that_cannot_be_compiled_is_undone(compiled_late, error):
    """The update has been written when the kernel of its sums is compiled for other sizes."""
    result = functools.partial(torch.zeros, dtype=torch.float64)
    function = works_once([], error, lambda theta: result((len(theta), 2, 0)), spoils=True)
    compiled_late.sgd_step = function
    sgd_step(torch.ones(2), torch.ones(2), lr=0.5)
    theta = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(RuntimeWarning, match=f"sgd_step: {type(error).__name__}"):
        sgd_step(theta, torch.ones(3), lr=0.5)
    assert theta.tolist() == [0.5, 1.5, 2.5]
    assert backend.backend_for("projected_step", "cpu") == "cpp"


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_a_later_launch_is_raised(compiled_late, size):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    result = functools.partial(torch.zeros, dtype=torch.float64)
    compiled_late.sgd_step = works_once([], error, lambda theta: result((len(theta), 2, 0)))
    sgd_step(torch.ones(2), torch.ones(2), lr=0.5)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sgd_step(torch.ones(size), torch.ones(size), lr=0.5)
    assert backend.backend_for("projected_step", "cpu") == "triton"


def test_classes_of_triton_are_known_by_their_names():
    errors = pytest.importorskip("triton.runtime.errors")
    compiler = pytest.importorskip("triton.compiler.errors")
    assert gpu_probe.is_compiler_error(errors.OutOfResources(300_000, 200_000, "shared memory"))
    assert gpu_probe.is_compiler_error(compiler.CompilationError("x", None, "unsupported"))
    assert not gpu_probe.is_compiler_error(ValueError("theta: expected"))
    assert not gpu_probe.is_compiler_error(RuntimeError("Triton Error [CUDA]: invalid argument"))


def test_every_op_declares_what_it_writes():
    prefixes = {
        "gram_update": "gram_", "norm_example_grads": "norm_", "norm_act_tangents": "norm_act_",
        "random_bits": "random_", "langevin": "langevin_", "row_norm_tangents": "row_norm_",
    }  # fmt: skip
    every = set()
    for family in backend.families():
        for function, written in backend._writes[family].items():
            names = (prefixes.get(family, "") + function, function)
            name = next(n for n in names if hasattr(torch.ops.entropic_fast, n))
            schema = getattr(torch.ops.entropic_fast, name).default._schema
            marked = [
                a.name
                for a in schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ]
            assert list(written) == marked, name
            every.add(name)
    assert every == set(OPS)
