"""Family `step` in Triton without a GPU: under the interpreter, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")

PLUGINS_OFF = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]

INTS = {"replicas": "i32", "size": "i32", "block_count": "i32"}
SGD = {
    "PIVOT_COUNT": 9,
    "MOMENTUM": 0.9,
    "TAKE": 1.0,
    "WEIGHT_DECAY": 5e-4,
    "NESTEROV": True,
    "FIRST": False,
}
ADAM = {
    "PIVOT_COUNT": 9,
    "LOG_BETA1": -0.10536051565782628, "LOG_BETA2": -0.0010005003335835344, "BETA2": 0.999,
    "TAKE1": 0.1, "TAKE2": 0.001, "EPS": 1e-8, "WEIGHT_DECAY": 0.01, "DECOUPLED": True,
}  # fmt: skip

# kernel -> (pointers of theta's dtype, float64 pointers, int64 pointers, integers, constants)
KERNELS = {
    "sgd_kernel": (("theta", "grad", "buffer", "pivots"), ("lr", "partial"), (), INTS, SGD),
    "sgd_kernel without pivots": (
        ("theta", "grad", "buffer", "pivots"),
        ("lr", "partial"),
        (),
        INTS,
        {**SGD, "PIVOT_COUNT": 0},
    ),
    "adam_kernel": (
        ("theta", "grad", "exp_avg", "exp_avg_sq", "pivots"),
        ("lr", "partial"),
        ("step",),
        INTS,
        ADAM,
    ),
    "sum_kernel": ((), ("partial", "sums"), (), {}, {"COUNT": 3000, "ROOT": True}),
    "choose_kernel": (
        (),
        ("products", "segment_squares", "position"),
        ("segment",),
        {"pivot_count": "i32"},
        {},
    ),
    "move_kernel": (
        ("theta", "pivots"),
        ("position", "partial"),
        ("segment",),
        INTS,
        {},
    ),
}


@needs_triton
def test_triton_agrees_with_the_reference_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when kernels are defined, hence a process of its own."""
    suite = Path(__file__).with_name("test_step.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(suite), "-q", "-k", "triton and cpu", *PLUGINS_OFF],
        env={**os.environ, "TRITON_INTERPRET": "1", "ENTROPIC_FAST_BACKEND": "auto"},
        cwd=suite.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 20, run.stdout
    assert "skipped" not in run.stdout, run.stdout


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype"),
    # Kernels without a tensor of theta's dtype are the same for both.
    [
        (name, dtype)
        for name, (values, *_) in KERNELS.items()
        for dtype in (("fp32", "fp64") if values else ("fp32",))
    ],
)
def test_triton_kernel_compiles_ahead_of_time(name: str, dtype: str, arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from entropic_fast.triton import step

    values, doubles, longs, integers, constants = KERNELS[name]
    constants = {**constants, "BLOCK": 1024}
    signature = {
        **dict.fromkeys(values, f"*{dtype}"),
        **dict.fromkeys(doubles, "*fp64"),
        **dict.fromkeys(longs, "*i64"),
        **integers,
        **dict.fromkeys(constants, "constexpr"),
    }
    kernel = getattr(step, name.split()[0])
    signature = {argument: signature[argument] for argument in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=step.FUSE)
    assert f"sm_{arch}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    if name == "sgd_kernel" and dtype == "fp64":
        # A float64 kernel whose constants went through float32 would be off by 1e-8.
        assert "dense<9.000000e-01> : tensor<1024xf64>" in compiled.asm["ttir"]
