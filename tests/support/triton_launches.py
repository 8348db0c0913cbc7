"""What launches of Triton kernels are made of, and their compilation without a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from langevin_kernel_cases import POTENTIALS, start
from norm_act_cases import Draw, jvp_options, norm_act_options, vjp_tangent_options
from torch import Tensor

import entropic_fast
from entropic_fast._torch.matmul_precision import matmul_precision, set_matmul_precision

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def triton_modules() -> list[ModuleType]:
    """Every module of the package that holds Triton kernels."""
    root = Path(entropic_fast.__file__).parent
    found = [
        p for p in sorted((root / "ops").rglob("*triton*.py")) if "import triton" in p.read_text()
    ]
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in found]
    return [importlib.import_module(name) for name in names]


class Recorder:
    """Stands for a kernel: notes each launch instead of launching."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of(work: Callable[[], Any], precision: str = "float32") -> list[Any]:
    """What `work` launches, as (kernel, arguments, options); nothing is launched."""
    launches: list[Any] = []
    before = matmul_precision()
    with contextlib.ExitStack() as stack:
        for module in triton_modules():
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorder = Recorder(getattr(module, name), launches)
                stack.enter_context(mock.patch.object(module, name, recorder))
        stack.callback(set_matmul_precision, before)
        set_matmul_precision(precision)
        work()
    return launches


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Any:
    """Compiles what `kernel[grid](*args, **options)` would, by Triton's rules for arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    options = {k: v for k, v in options.items() if k not in constants}
    signature: dict[str, str] = {}
    divisible = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names[: len(args)], args, strict=True)):
        as_it_is = not kernel.params[i].do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        elif value == 1 and as_it_is:
            constants[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and as_it_is:
                divisible[(i,)] = [["tt.divisibility", 16]]
    signature = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


# ---- what the host functions launch --------------------------------------------------------------


def steps(dtype: torch.dtype, size: int, count: int = 9) -> None:
    """An update by SGD with momentum, one by Adam, a projection: eight replicas."""
    from entropic_fast.ops.projected_step import triton as step
    from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep

    theta, pivots = torch.empty(8, size, dtype=dtype), torch.empty(count, size, dtype=dtype)
    lr = torch.empty(8, dtype=torch.float64)
    step.sgd_step(SgdStep(theta, theta, theta, lr, pivots, 0.9, 0.0, 5e-4, False, False))
    counts = torch.ones(8, dtype=torch.int64)
    state = theta, theta, theta, counts, lr
    step.adam_step(AdamStep(theta, *state, pivots, 0.9, 0.999, 1e-8, 5e-4, True))
    products = torch.empty(8, 2, count, dtype=torch.float64)
    if count < 2:
        return
    step.project_step(ProjectStep(theta, products, pivots, lr.new_empty(count - 1)))


def tangents(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Each kernel with all of its pieces and with none; sizes of 1 become constants."""
    from entropic_fast.ops.norm_act_tangents import checks
    from entropic_fast.ops.norm_act_tangents import triton as kernels

    draw = Draw(dtype)
    u, extra = draw(*shape), draw.tangents(*shape, "interleaved")
    out = torch.empty_like(u)
    kernels.jvp(checks.Jvp(u, extra, *jvp_options(draw, *shape).values(), out))
    kernels.jvp(checks.Jvp(u, *[None] * 9, out))
    kernels.vjp_tangent(
        checks.VjpTangent(u, extra, *vjp_tangent_options(draw, *shape).values(), out)
    )
    kernels.vjp_tangent(checks.VjpTangent(u, *[None] * 10))
    kernels.inner_products(checks.InnerProducts(u, extra if extra is not None else u))
    m, c = shape[1:]
    y = draw(m, c)
    rows = draw(c), draw(c)
    kernels.norm_act(checks.NormAct(y, *rows, *norm_act_options(draw, m, c).values(), True))
    kernels.norm_act(checks.NormAct(y, *rows, None, None, None, False))


def row_tangents(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Each kernel with all of its pieces and with none."""
    from entropic_fast.ops.row_norm_tangents import checks
    from entropic_fast.ops.row_norm_tangents import triton as kernels

    k, m, d = shape
    t, normal, weights = (torch.empty(s, dtype=dtype) for s in ((k, m, d), (m, d), (k, d)))
    rstd, weight = torch.empty(m, dtype=dtype), torch.empty(d, dtype=dtype)
    kernels.jvp(checks.Jvp(t, normal, rstd, weight, weights, weights, normal, True))
    kernels.jvp(checks.Jvp(t, normal, rstd, None, None, None, None, False))
    kernels.vjp_tangent(checks.VjpTangent(normal, rstd, t, t, weight, weights, normal, True, True))
    kernels.vjp_tangent(checks.VjpTangent(normal, rstd, t, None, None, None, None, False, False))


def convolve(dtype: torch.dtype, size: tuple[int, ...], c: int, o: int, groups: int = 1) -> None:
    """Both ends, as the layer of a network launches them (sizes of 1 become constants)."""
    from entropic_fast.ops.conv_example_grads import triton as kernels
    from entropic_fast.ops.conv_example_grads.checks import ConvWeightGrads, ConvWeightNorms

    kernel = [3 if s > 1 else 1 for s in size]
    sizes = (kernel, [1] * 3, [k // 2 for k in kernel], [1] * 3, groups)
    a, g = (torch.empty(2, *size, channels, dtype=dtype) for channels in (c, o))
    width = o * torch.tensor(kernel).prod().item() * c // groups
    out = torch.empty(2, width, dtype=dtype)
    kernels.conv_weight_grads(ConvWeightGrads(a, g, out, *sizes))
    kernels.conv_weight_norms(ConvWeightNorms(a, g, *sizes))


def update(dtype: torch.dtype, count: int, columns: int, double: bool = False) -> None:
    from entropic_fast.ops.gram_update import triton as kernels
    from entropic_fast.ops.gram_update.checks import CrossUpdate, SymmetricUpdate

    rows, gram = torch.empty(count, columns, dtype=dtype), torch.empty(count, count).double()
    kernels.symmetric_update_(SymmetricUpdate(gram, rows, double))
    kernels.cross_update_(CrossUpdate(gram, rows, rows, double))


def normalize(dtype: torch.dtype) -> None:
    from entropic_fast.ops.norm_example_grads import triton as kernels
    from entropic_fast.ops.norm_example_grads.checks import AffineGrads, BatchNormBackward

    x, one = torch.empty(2, 64, 32, dtype=dtype), torch.empty(32, dtype=dtype)
    kernels.batch_norm_backward(BatchNormBackward(x, x, one, one, one))
    kernels.affine_grads(AffineGrads(x, x, x[:, :, :1].contiguous(), one[None, None]))


def langevin_steps(potential: str, scheme: str, dtype: torch.dtype) -> None:
    """Langevin steps in the plane and, but on the ring, in five dimensions."""
    from entropic_fast.ops.langevin import triton as kernels
    from entropic_fast.ops.langevin.checks import LangevinSteps

    for dim in (2,) if potential == "ring" else (2, 5):
        x, v = start(100, dim, scheme, dtype)
        options = (0.01, 0.9, 0.0 if potential == "ridge" else 0.1, 50, 2**33, 3, 2**62 + 1)
        v = x.new_empty(0) if v is None else v
        parameters = POTENTIALS[potential]
        kernels.langevin_steps(LangevinSteps(x, v, potential, parameters, scheme, *options, ""))


def random_numbers(kind: str, dtype: torch.dtype) -> None:
    """A row of numbers, a block of columns for eight streams, and words at any counters."""
    from entropic_fast.ops.random_bits import triton as random_bits
    from entropic_fast.ops.random_bits.checks import Fill, Philox

    several, none = torch.arange(3), torch.arange(0)
    row, columns = torch.empty(1, 1, 2000, dtype=dtype), torch.empty(500, 8, dtype=dtype)
    random_bits.fill(Fill(row, none, 2**62 + 1, 3, 2**40, kind, ""))
    random_bits.fill(Fill(columns.T[:, None], none, 5, 2**62, 0, kind, ""))
    if kind == "words":
        random_bits.philox(Philox(torch.arange(30).view(3, 10), several, several, ""))


SCORES: dict[str, Callable[[], None]] = {
    "conv": lambda: convolve(torch.float32, (1, 16, 16), 64, 64),
    "conv-first-layer": lambda: convolve(torch.float32, (1, 32, 32), 3, 16),
    "conv-odd-3d": lambda: convolve(torch.float32, (5, 7, 9), 13, 37),
    "conv-1d": lambda: convolve(torch.float32, (1, 1, 50), 16, 24),
    "conv-one-pixel": lambda: convolve(torch.float32, (1, 1, 1), 20, 20),
    "conv-double": lambda: convolve(torch.float64, (1, 8, 8), 32, 40),
    "conv-depthwise": lambda: convolve(torch.float32, (1, 8, 8), 32, 32, 32),
    "conv-depthwise-double": lambda: convolve(torch.float64, (3, 7, 8), 9, 18, 9),
    "gram": lambda: update(torch.float32, 256, 20_000),
    "gram-odd": lambda: update(torch.float32, 1100, 1001),
    "gram-one": lambda: update(torch.float32, 1, 1),
    "gram-double-products": lambda: update(torch.float32, 70, 5000, True),
    "gram-double": lambda: update(torch.float64, 70, 5000),
    "norm": lambda: normalize(torch.float32),
    "norm-double": lambda: normalize(torch.float64),
}
