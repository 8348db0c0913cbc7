"""The CUDA C++ of csrc/cuda compiled for the CPU, and the families of operations on it.

`build` compiles every .cu file with tests/cuda_emulation/cuda_runtime.h in place of CUDA's own
header, and the file of C functions of the same name beside that header. Launches
`kernel<<<...>>>(...)` are rewritten as calls; nothing else of a .cu file changes. No fused
multiply-adds, as in the CPU kernels, which share csrc/kernels: their updates are the same bits.

The functions at the end implement families `projected_step` and `random_bits` for CPU tensors, so
that the families' own tests take them as one more backend: `PLACE` among their places, and
`stand_in`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.projected_step import native as step_native
from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep
from entropic_fast.ops.random_bits.checks import KINDS, Fill, Philox
from entropic_fast.ops.random_bits.native import DTYPES

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wall",
    "-Wno-unknown-pragmas", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE",
]  # fmt: skip
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# In a process that loads AddressSanitizer first, as .ci/sanitize does, this code is checked too.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


@dataclass(frozen=True)
class Fault:
    """A mistake planted in a copy of a .cu file: where `at` occurs, `old` in it becomes `new`.

    Both occur once. `old` is a statement if it ends in ";", and otherwise an expression.
    """

    name: str
    at: str
    old: str
    new: str

    def begin(self, text: str) -> int:
        """Where `old` begins in a file."""
        found = text.count(self.at), self.at.count(self.old)
        assert found == (1, 1), f"{self.name}: found {found} times"
        return text.index(self.at) + self.at.index(self.old)


def planted(text: str, faults: Sequence[Fault]) -> str:
    """A file with all faults in it: number i + 1 is in effect where `planted` is i + 1."""
    sites: dict[tuple[int, str], list[int]] = {}
    for i, fault in enumerate(faults):
        sites.setdefault((fault.begin(text), fault.old), []).append(i)
    for (begin, old), here in sorted(sites.items(), reverse=True):
        statement = old.endswith(";")
        both = f"{{ {old} }}" if statement else f"({old})"
        for i in here:
            if statement:
                both = f"if (planted == {i + 1}) {{ {faults[i].new} }} else {both}"
            else:
                both = f"(planted == {i + 1} ? ({faults[i].new}) : {both})"
        text = text[:begin] + both + text[begin + len(old) :]
    return text


def missing() -> str | None:
    """Why csrc/cuda cannot be compiled for the CPU here, or None."""
    if sys.platform != "linux":
        return "the CUDA emulation switches stacks as Linux does"
    return None if shutil.which("g++") else "no C++ compiler (g++)"


# A backend and a device, as the families' tests name them.
PLACE = pytest.param(
    ("emulated", "cpu"),
    id="cuda-emulated",
    marks=pytest.mark.skipif(missing() is not None, reason=str(missing())),
)


def stand_in(family: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has this module implement a family until the test ends, in place of the backend returned."""
    monkeypatch.setitem(backend._families[family], "cpp", __name__)
    return "cpp"


# ---- compiling -----------------------------------------------------------------------------------


def rewritten(text: str) -> str:
    """A .cu file as C++: `k<T><<<grid, threads, bytes, stream>>>(a);` is
    `emulation::launch(grid, threads, bytes, stream, [=] { k<T>(a); });`.

    >>> rewritten("{ k<T><<<2, 32, 0, s>>>(a, f(b)); }")
    '{ emulation::launch(2, 32, 0, s, [=] { k<T>(a, f(b)); }); }'
    """
    parts, done = [], 0
    while (opening := text.find("<<<", done)) >= 0:
        begin = max(text.rfind(mark, 0, opening) for mark in ";{}") + 1
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        closing = text.index(">>>", opening)
        first = text.index("(", closing)
        end = _after_parenthesis(text, first)
        kernel, configuration = text[begin:opening], text[opening + 3 : closing]
        call = f"emulation::launch({configuration}, [=] {{ {kernel}{text[first:end]}; }})"
        parts += [text[done:begin], call]
        done = end
    return "".join([*parts, text[done:]])


def _after_parenthesis(text: str, first: int) -> int:
    depth = 0
    for i in range(first, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError("a parenthesis that is never closed")


def build(folder: Path, faults: Sequence[Fault] = (), source: str = "") -> Path:
    """Compiles all of csrc/cuda into a library in `folder`; with faults, `source` alone."""
    files = [file for file in SOURCES if source in ("", file.name)]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda file: _compiled(file, folder, faults), files))
    library = folder / "emulated_cuda.so"
    _run(["g++", *_flags(), *map(str, objects), "-o", str(library)])
    return library


def _compiled(file: Path, folder: Path, faults: Sequence[Fault]) -> Path:
    text = planted(file.read_text(), faults)
    head = '#include "entries.h"\n'
    if faults:
        head += "static int planted = 0;\nEXPORTED void plant(int number) { planted = number; }\n"
    both = folder / f"{file.stem}.cpp"
    parts = {file.name: rewritten(text), both.name: (EMULATION / both.name).read_text()}
    both.write_text(head + "".join(f'#line 1 "{name}"\n{part}\n' for name, part in parts.items()))
    output = folder / f"{file.stem}.o"
    include = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    _run(["g++", "-c", *_flags(), *include, str(both), "-o", str(output)])
    return output


def _flags() -> list[str]:
    return [*FLAGS, *(SANITIZERS if SANITIZED else [])]


def _run(command: list[str]) -> None:
    # The sanitizers' libraries, loaded into this process first, are not for the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


# ---- calling -------------------------------------------------------------------------------------


class Library:
    """The launchers of csrc/cuda, compiled for the CPU. A CUDA error becomes a RuntimeError."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        self._library.step_workspace.restype = ctypes.c_int64

    def order(self, seed: int) -> None:
        """The order of blocks, warps and threads from now on: 0 as they are numbered, or random."""
        self._library.order(ctypes.c_uint(seed))

    def plant(self, number: int) -> None:
        """Which fault is in effect, counted from 1; 0 for none."""
        self._library.plant(ctypes.c_int(number))

    def call(self, name: str, *arguments: Any) -> None:
        """One C function; tensors are passed by address."""
        entry = getattr(self._library, name)
        entry.restype = ctypes.c_char_p
        message = entry(*map(_passed, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def step(self, op: str, theta: Tensor, pivots: Tensor, products: Tensor, *more: Any) -> None:
        """One launcher of projected_step.h. Scratch memory holds NaN, as it may on a GPU."""
        sizes = (*theta.shape, pivots.shape[0])
        count = self._library.step_workspace(*map(ctypes.c_int64, sizes))
        assert count == step_native.workspace_doubles(*sizes)
        workspace = torch.full((count,), torch.nan, dtype=torch.float64)
        pointers = [t.data_ptr() for t in (theta, pivots, products, workspace)]
        name = f"{op}_{str(theta.dtype).removeprefix('torch.')}"
        self.call(name, _Place(*pointers, *sizes), *more)


class _Place(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("theta", "pivots", "products", "workspace")),
        *((name, ctypes.c_int64) for name in ("replicas", "size", "pivot_count")),
    ]


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    for kind, passed in ((float, ctypes.c_double), (bool, ctypes.c_int), (int, ctypes.c_int64)):
        if isinstance(argument, kind):
            return passed(argument)  # of integers, the last 64 bits
    return argument


@functools.cache
def library() -> Library:
    """csrc/cuda as it is, compiled once for each process."""
    with tempfile.TemporaryDirectory() as folder:
        return Library(build(Path(folder)))


_used: list[Library] = []


@contextmanager
def used(other: Library) -> Iterator[None]:
    """The functions below run on `other` inside the block."""
    _used.append(other)
    try:
        yield
    finally:
        _used.pop()


def _now() -> Library:
    return _used[-1] if _used else library()


def _step(op: str, theta: Tensor, pivots: Tensor, products: Tensor, *more: Any) -> None:
    _now().step(op, theta, pivots, products, *more)


# ---- family `projected_step` --------------------------------------------------------------------


def sgd_step(a: SgdStep) -> Tensor:
    products = _products(a.theta, a.pivots)
    settings = (float(x) for x in (a.momentum, a.dampening, a.weight_decay))
    state = (a.grad, a.momentum_buffer, a.lr)
    _step("sgd_step", a.theta, a.pivots, products, *state, *settings, a.nesterov, a.first)
    return products


def adam_step(a: AdamStep) -> Tensor:
    products = _products(a.theta, a.pivots)
    settings = (float(x) for x in (a.beta1, a.beta2, a.eps, a.weight_decay))
    state = (a.grad, a.exp_avg, a.exp_avg_sq, a.step, a.lr)
    _step("adam_step", a.theta, a.pivots, products, *state, *settings, a.decoupled)
    return products


def project_step(a: ProjectStep) -> tuple[Tensor, Tensor, Tensor]:
    replicas = a.theta.shape[0]
    segment = torch.full((replicas,), -1, dtype=torch.int64)
    t, distance = (torch.full((replicas,), -1.0, dtype=torch.float64) for _ in range(2))
    results = (segment, t, distance)
    _step("project_step", a.theta, a.pivots, a.products, a.segment_squares, *results)
    return results


def _products(theta: Tensor, pivots: Tensor) -> Tensor:
    return torch.full((theta.shape[0], 2, len(pivots)), torch.nan, dtype=torch.float64)


# ---- family `random_bits` ------------------------------------------------------------------------


def fill(a: Fill) -> None:
    keys = a.seeds.contiguous() if len(a.seeds) else None
    what = list(KINDS).index(a.kind), DTYPES.index(a.out.dtype)
    sizes = (*a.out.shape, *a.out.stride())
    _now().call("random_fill", a.out, *sizes, keys, a.seed, a.first_stream, a.start, *what)


def philox(a: Philox) -> Tensor:
    out = torch.full((*a.counters.shape, 4), -1)
    sizes = (*a.counters.shape, *a.counters.stride())
    rows = a.seeds.contiguous(), a.streams.contiguous()
    _now().call("random_philox", a.counters, *rows, out, *sizes)
    return out
