"""Compiled GPU kernels need no more registers, shared memory and spills than is recorded."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import kernel_budgets
import pytest

RECORDED = kernel_budgets.load()
VERSIONS = kernel_budgets.versions()
ANEW = "`python tests/support/kernel_budgets.py` records them again"


def other_version(compiler: str) -> str:
    """Why numbers of this compiler say nothing of the record, or nothing."""
    here, recorded = VERSIONS.get(compiler), RECORDED["versions"][compiler]
    return "" if here == recorded else f"{compiler}: {here} here, recorded with {recorded}"


needs_triton = pytest.mark.skipif(
    bool(other_version("triton")) or os.environ.get("TRITON_INTERPRET") == "1",
    reason=other_version("triton") or "kernels are interpreted",
)
needs_nvcc = pytest.mark.skipif(bool(other_version("nvcc")), reason=other_version("nvcc"))
# Compilation for the others takes as long again, each.
ARCHS = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def assert_within(found: dict[str, dict[str, Any]], name: str, arch: int) -> None:
    recorded = RECORDED["kernels"][name]
    assert found.keys() == recorded.keys(), ANEW
    for kernel, numbers in found.items():
        ceilings = recorded[kernel][f"sm_{arch}"]
        for key, value in numbers.items():
            where = f"{name}: {kernel} for sm_{arch}, {key}"
            if key in kernel_budgets.LIMITS:
                assert value <= ceilings[key], where
            else:
                assert value == ceilings[key], f"{where}; if it is better, {ANEW}"


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", kernel_budgets.triton_work() if HAS_TRITON else ())
def test_triton_kernels_need_no_more_than_recorded(name: str, arch: int) -> None:
    assert_within(kernel_budgets.triton_kernels(name, arch), name, arch)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", kernel_budgets.SOURCES, ids=lambda source: source.name)
def test_cuda_kernels_need_no_more_than_recorded(source: Any, arch: int) -> None:
    assert_within(kernel_budgets.cuda_kernels(source, arch), source.name, arch)


def test_everything_is_recorded_for_every_architecture() -> None:
    names = {*(kernel_budgets.triton_work() if HAS_TRITON else ())}
    names |= {source.name for source in kernel_budgets.SOURCES}
    assert names <= RECORDED["kernels"].keys(), ANEW
    for kernels in RECORDED["kernels"].values():
        for archs in kernels.values():
            assert list(archs) == [f"sm_{arch}" for arch in kernel_budgets.ARCHS]


@needs_triton
def test_every_triton_kernel_is_among_the_launches() -> None:
    from triton_launches import triton_modules

    kernels = {
        name for module in triton_modules() for name in vars(module) if name.endswith("_kernel")
    }
    recorded = {kernel for found in RECORDED["kernels"].values() for kernel in found}
    # What only tests launch, and the trivial kernel that shows whether Triton works here.
    assert kernels - recorded <= {"box_muller_kernel", "double_kernel"}, ANEW


PTX = """.version 8.0
.target sm_80
.address_size 64
.visible .entry two_loads(.param .u64 a)
{
.reg .b32 %r<9>; .reg .f32 %f<5>; .reg .f64 %d<3>; .reg .b64 %rd<3>;
ld.param.u64 %rd1, [a];
cvta.to.global.u64 %rd2, %rd1;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];
ld.global.nc.f64 %d1, [%rd2+16];
fma.rn.f64 %d2, %d1, %d1, %d1;
st.global.f64 [%rd2], %d2;
st.global.v4.b32 [%rd2+32], {%r1, %r2, %r3, %r4};
ret;
}
"""


@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
def test_what_is_read_out_of_ptx() -> None:
    found = kernel_budgets.measured(PTX, kernel_budgets.triton_ptxas(80))["two_loads"]
    assert found["loads"] == [8, 16] and found["products"] == ["fma f64"]
    assert found["spilled bytes"] == found["shared bytes"] == 0 < found["registers"] < 32
    body = "\n".join(
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1}, {%d2}, {%d3}, {%d1};",
            "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {%f1}, %rd1, %rd2;",
            "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        )
    )
    assert kernel_budgets._products(body) == ["mma m8n8k4 f64", "wgmma m64n128k8 tf32"]
    assert kernel_budgets._loads(body) == [16]
