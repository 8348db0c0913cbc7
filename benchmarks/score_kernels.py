"""The kernels of the score families on layers of the paper's networks, with operations and bytes.

The limit of a kernel's time is the larger of its operations over the machine's peak rate and its
bytes over the copy bandwidth; both are measured in the same rounds as the kernels. What fits in
the caches can beat the copy, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rounds import DEVICE, FULL
from torch import Tensor

from entropic_fast.ops import backend
from entropic_fast.ops.conv_example_grads import conv_weight_grads, conv_weight_norms
from entropic_fast.ops.gram_update import cross_update_, symmetric_update_
from entropic_fast.ops.norm_example_grads import affine_grads, batch_norm_backward

EXAMPLES = 32 if FULL else 2  # a chunk of the engine
GRAM = 1024 if FULL else 32
WIDE = 16_384 if FULL else 300  # columns of a slice of the score matrix
EDGE = 2048 if FULL else 128  # of the matrix product that shows the peak rate
COPIED = 2**28 if FULL else 2**16  # bytes

# (channels in, channels out, image size, kernel, stride)
CONVOLUTIONS = [
    (3, 16, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (16, 32, 32, 3, 2),
    (32, 32, 16, 3, 1),
    (64, 64, 8, 3, 1),
    (16, 32, 32, 1, 2),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (128, 128, 16, 3, 1),
    (256, 256, 8, 3, 1),
]
NORMS = [(16, 32), (64, 8), (64, 32), (256, 8)]  # (channels, image size)


@dataclass
class Kernel:
    """One call, what it computes, and what it has to read and write."""

    name: str
    family: str
    run: Callable[[], Any]
    operations: float
    bytes: float
    dtype: torch.dtype = torch.float32


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


def convolutions() -> list[Kernel]:
    out = []
    for c, o, size, k, stride in CONVOLUTIONS if FULL else CONVOLUTIONS[:3]:
        after, padding = -(-size // stride), k // 2
        a, g = normal(EXAMPLES, size, size, c), normal(EXAMPLES, after, after, o)
        rows = torch.empty(EXAMPLES, o * k * k * c, device=DEVICE)
        settings: dict[str, Any] = {
            "stride": (stride, stride),
            "padding": (padding, padding),
            "dilation": (1, 1),
        }
        operations = 2.0 * EXAMPLES * after**2 * k**2 * c * o
        read = 4.0 * (a.numel() + g.numel())
        label = f"{c}->{o} at {size}x{size}, {k}x{k}" + (f", stride {stride}" * (stride > 1))

        def store(a=a, g=g, k=k, rows=rows, settings=settings) -> Tensor:
            return conv_weight_grads(a, g, (k, k), out=rows, **settings)

        def square(a=a, g=g, k=k, settings=settings) -> Tensor:
            return conv_weight_norms(a, g, (k, k), **settings)

        def whole_batch(a=a, g=g, c=c, o=o, k=k, stride=stride, padding=padding) -> Tensor:
            """torch's own weight gradient of the batch, for comparison."""
            return torch.nn.grad.conv2d_weight(
                a.permute(0, 3, 1, 2), (o, c, k, k), g.permute(0, 3, 1, 2), stride, padding
            )

        written = 4.0 * rows.numel()
        out += [
            Kernel(
                f"weight gradients {label}",
                "conv_example_grads",
                store,
                operations,
                read + written,
            ),
            Kernel(f"weight norms {label}", "conv_example_grads", square, operations, read),
            Kernel(f"torch, whole batch {label}", "torch", whole_batch, operations, read),
        ]
    return out


def grams() -> list[Kernel]:
    out = []
    gram = torch.zeros(GRAM, GRAM, dtype=torch.float64, device=DEVICE)
    half = gram[: GRAM // 2, : GRAM // 2]
    for k in (GRAM // 4 * 9, WIDE):
        for dtype, double in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.float64, True),
        ):
            rows = normal(GRAM, k, dtype=dtype)
            kind = str(dtype)[6:]
            if double and dtype == torch.float32:
                kind += ", float64 products"
            # One triangle: half of 2 E^2 K; and read and written in float64.
            operations, item = float(GRAM) * (GRAM + 1) * k, rows.element_size()
            moved = item * rows.numel() + 8.0 * GRAM * (GRAM + 1)
            precision = torch.float64 if double else torch.float32

            def update(rows=rows, double=double) -> None:
                symmetric_update_(gram, rows, double_products=double)

            def cross(rows=rows, double=double) -> None:
                middle = len(rows) // 2
                cross_update_(half, rows[:middle], rows[middle:], double_products=double)

            out += [
                Kernel(
                    f"symmetric update {GRAM} x {k}, {kind}",
                    "gram_update",
                    update,
                    operations,
                    moved,
                    precision,
                ),
                Kernel(
                    f"cross update {GRAM // 2} x {GRAM // 2} x {k}, {kind}",
                    "gram_update",
                    cross,
                    2.0 * (GRAM // 2) ** 2 * k,
                    item * rows.numel() + 4.0 * GRAM**2,
                    precision,
                ),
            ]
            if not double:

                def product(rows=rows) -> Tensor:
                    return rows @ rows.T

                out.append(
                    Kernel(
                        f"torch.mm {GRAM} x {k}, whole square",
                        "torch",
                        product,
                        2.0 * GRAM**2 * k,
                        item * rows.numel() + 4.0 * GRAM**2,
                    )
                )
    return out


def norms() -> list[Kernel]:
    out = []
    for c, size in NORMS if FULL else NORMS[:1]:
        x, g = normal(EXAMPLES, size * size, c), normal(EXAMPLES, size * size, c) + 1
        mean, rstd, weight = normal(c), normal(c).abs() + 0.5, normal(c)
        group = [t.expand(EXAMPLES, 1, c).contiguous() for t in (mean, rstd)]
        moved = 4.0 * x.numel()

        def both(x=x, g=g, mean=mean, rstd=rstd, weight=weight) -> Any:
            return batch_norm_backward(x, g, mean, rstd, weight)

        def affine(x=x, g=g, group=group) -> Any:
            return affine_grads(x, g, *group)

        out += [
            Kernel(
                f"batch norm backward {c} at {size}x{size}",
                "norm_example_grads",
                both,
                6.0 * x.numel(),
                3 * moved,
            ),
            Kernel(
                f"scale and shift {c} at {size}x{size}",
                "norm_example_grads",
                affine,
                5.0 * x.numel(),
                2 * moved,
            ),
        ]
    return out


def yardsticks() -> list[Kernel]:
    """What the machine does at its best: matrix products, a convolution, a copy."""
    out = []
    for dtype in (torch.float32, torch.float64):
        a, b = normal(EDGE, EDGE, dtype=dtype), normal(EDGE, EDGE, dtype=dtype)

        def product(a=a, b=b) -> Tensor:
            return a @ b

        name = f"torch.mm {str(dtype)[6:]}"
        out.append(Kernel(name, "peak", product, 2.0 * EDGE**3, 3.0 * 8 * EDGE**2, dtype))
    c, size = (256, 16) if FULL else (16, 4)
    image = normal(EXAMPLES, c, size, size).contiguous(memory_format=torch.channels_last)
    weight = normal(c, c, 3, 3).contiguous(memory_format=torch.channels_last)

    def convolution() -> Tensor:
        return torch.nn.functional.conv2d(image, weight, padding=1)

    operations = 2.0 * image.numel() * 9 * c
    out.append(Kernel("convolution float32", "peak", convolution, operations, 8.0 * image.numel()))
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    out.append(Kernel("copy", "bandwidth", lambda: target.copy_(source), 0.0, 2.0 * COPIED))
    return out


def on(name: str | None, kernel: Kernel) -> Callable[[], Any]:
    """The kernel on a backend by name, None for the one that is chosen by itself."""

    def run() -> Any:
        backend.set_backend(name)
        try:
            return kernel.run()
        finally:
            backend.set_backend(None)

    return run
