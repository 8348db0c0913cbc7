"""What the compiled GPU kernels need: registers, spills, shared memory, matrix instructions, loads.

Every Triton launch below and every kernel of csrc/cuda/*.cu is compiled to PTX for each
architecture, without a GPU, and the PTX goes through ptxas, which says what the kernel needs.
`python tests/support/kernel_budgets.py` writes the ceilings in tests/support/kernel_budgets.json,
which tests/test_kernel_budgets.py asserts and docs/gpu.md shows. Numbers depend on the compilers,
so their versions are recorded too.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = (80, 90, 100)
# Ceilings: a kernel may need less. What else `measured` finds must be as recorded.
LIMITS = ("registers", "spilled bytes", "shared bytes")


@dataclass(frozen=True)
class Work:
    """A call whose launches are compiled, with the precision of float32 products."""

    call: Callable[[], Any]
    precision: str = "float32"


def triton_work() -> dict[str, Work]:
    """By name: a family and what is special about the call."""
    from triton_launches import (
        SCORES,
        langevin_steps,
        random_numbers,
        row_tangents,
        steps,
        tangents,
    )

    single, double = torch.float32, torch.float64
    work = {
        "step, float32, P = 272,474": Work(lambda: steps(single, 272_474)),
        "step, float32, P = 272,480": Work(lambda: steps(single, 272_480)),
        "step, float64, P = 272,474": Work(lambda: steps(double, 272_474)),
        "jet, float32, 4 tangents, 256 x 32": Work(lambda: tangents(single, (4, 256, 32))),
        "jet, float64, 8 tangents, 100 x 64": Work(lambda: tangents(double, (8, 100, 64))),
        "row norm, float32, 4 tangents, 2048 x 192": Work(
            lambda: row_tangents(single, (4, 2048, 192))
        ),
        "row norm, float64, 8 tangents, 512 x 1024": Work(
            lambda: row_tangents(double, (8, 512, 1024))
        ),
        "langevin, float32, ring, BAOAB": Work(lambda: langevin_steps("ring", "baoab", single)),
        "langevin, float64, channel, Euler": Work(
            lambda: langevin_steps("channel", "euler-maruyama", double)
        ),
    }
    work |= {
        f"random bits, {kind}, {str(dtype).removeprefix('torch.')}": Work(
            functools.partial(random_numbers, kind, dtype)
        )
        for kind, dtype in (("words", torch.int64), ("signs", single), ("uniform", double))
    }
    names = ("conv", "conv-first-layer", "conv-double", "conv-depthwise", "gram", "gram-odd",
             "gram-double-products", "gram-double", "norm", "norm-double")  # fmt: skip
    work |= {f"score, {name}": Work(SCORES[name]) for name in names}
    reduced = ((name, p) for name in ("conv", "gram") for p in ("tf32x3", "tf32"))
    return work | {f"score, {name}, {p}": Work(SCORES[name], p) for name, p in reduced}


def triton_kernels(name: str, arch: int) -> dict[str, dict[str, Any]]:
    """What each kernel needs that a call of `triton_work` launches."""
    from triton_launches import compile_launch, launches_of

    work = triton_work()[name]
    found: dict[str, dict[str, Any]] = {}
    for kernel, arguments, options in launches_of(work.call, work.precision):
        compiled = compile_launch(kernel, arguments, options, arch)
        [numbers] = measured(compiled.asm["ptx"], triton_ptxas(arch)).values()
        # Triton asks for its shared memory when it launches.
        numbers["shared bytes"] = compiled.metadata.shared
        before = found.get(kernel.__name__, numbers)
        found[kernel.__name__] = {
            key: max(before[key], value) if key in LIMITS else sorted({*before[key], *value})
            for key, value in numbers.items()
        }
    return found


def cuda_kernels(source: Path, arch: int) -> dict[str, dict[str, Any]]:
    """What each kernel of a .cu file needs."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        command = [nvcc, "-ptx", f"-arch=sm_{arch}", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(source), "-o", str(ptx)], check=True, capture_output=True)
        found = measured(ptx.read_text(), nvcc_ptxas())
    names = subprocess.run(["c++filt", *found], capture_output=True, text=True, check=True)
    short = [_short(name) for name in names.stdout.splitlines()]
    assert len({*short}) == len(short)
    return dict(zip(short, found.values(), strict=True))


def _short(name: str) -> str:
    """A kernel's name and template arguments.

    >>> _short("void a::k<a::N<unsigned short, (unsigned short)7> >(a::B, long)")
    'k<N<unsigned short, (unsigned short)7>>'
    """
    name = re.sub(r"^void |\(anonymous namespace\)::|\w+::", "", name).replace("> >", ">>")
    depth = 0
    for i, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        if sign == "(" and depth == 0:
            return name[:i]
    return name


# ---- ptxas ---------------------------------------------------------------------------------------


def triton_ptxas(arch: int) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    return str(blackwell if arch >= 100 and blackwell.exists() else folder / "ptxas")


@functools.cache
def nvcc_ptxas() -> str:
    """The assembler that nvcc would call; it may be a wrapper that calls another nvcc."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "probe.cu"], capture_output=True, text=True, check=True
    )
    folder = re.search(r"^#\$ _HERE_=(.*)$", said.stderr + said.stdout, re.MULTILINE)
    assert folder is not None
    return str(Path(folder[1].strip()) / "ptxas")


def measured(ptx: str, ptxas: str) -> dict[str, dict[str, Any]]:
    """By kernel: registers, bytes spilled and shared, kinds of products, widths of loads."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for part in (done.stderr + done.stdout).split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        body = re.search(rf"\.entry {re.escape(name)}\(.*?(?=\.entry |\Z)", ptx, re.DOTALL)
        assert body is not None
        found[name] = {
            "registers": _number(r"Used (\d+) registers", part),
            "spilled bytes": _number(r"(\d+) bytes spill stores", part),
            "shared bytes": _number(r"(\d+) bytes smem", part),
            "products": _products(body[0]),
            "loads": _loads(body[0]),
        }
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _products(body: str) -> list[str]:
    """Matrix instructions, as "mma m8n8k4 f64" with the type of the factors; where there are none,
    the types of fused multiply-adds.
    """
    kinds = set()
    for name, rest in re.findall(r"\b(mma|wgmma\.mma_async|tcgen05\.mma)\.(\S+)", body):
        shape = re.search(r"m\d+n\d+k\d+", rest)
        types = re.findall(r"\b(f64|tf32|bf16|f16|f32)\b", rest)
        factors = next((t for t in types if t != "f32"), "f32")
        kinds.add(" ".join(filter(None, (name.split(".")[0], shape and shape[0], factors))))
    return sorted(kinds or {f"fma f{n}" for n in re.findall(r"\bfma\.rn\.f(32|64)(?:x2)?\b", body)})


def _loads(body: str) -> list[int]:
    """The widths of loads from global memory, in bytes a thread."""
    pattern = r"\bld\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    widths = {int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, body)}
    copies = re.findall(r"\bcp\.async\S* .*?\], 0x([0-9a-f]+)", body)
    return sorted(widths | {int(n, 16) for n in copies})


# ---- the record ----------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The compilers that can be found here."""
    found = {}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
        release = re.search(r"V([\d.]+)", said.stdout)
        assert release is not None
        found["nvcc"] = release[1]
    return found


def load() -> dict[str, Any]:
    """The record: "versions", and "kernels" by call or file, kernel and architecture."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def _everything() -> dict[str, Any]:
    calls = {name: functools.partial(triton_kernels, name) for name in triton_work()}
    calls |= {file.name: functools.partial(cuda_kernels, file) for file in SOURCES}
    kernels: dict[str, Any] = {}
    for name, call in calls.items():
        for arch in ARCHS:
            for kernel, numbers in call(arch).items():
                kernels.setdefault(name, {}).setdefault(kernel, {})[f"sm_{arch}"] = numbers
        sys.stderr.write(f"{name}\n")
    return {"versions": versions(), "kernels": kernels}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    RECORD.write_text(json.dumps(_everything(), indent=1) + "\n")
