"""What a launch of Triton kernels is made of, and its compilation without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.int64: "*i64",
}  # fmt: skip


class Recorder:
    """Stands for a kernel: notes each launch instead of launching."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


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
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    signature = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
