"""Per-example weight gradients of a convolution in plain PyTorch, one kernel offset at a time.

Shapes as in `entropic_fast.ops.conv_example_grads`, with three spatial dimensions always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor


def conv_weight_grads(
    a: Tensor,  # [n, D, H, W, C]
    g: Tensor,  # [n, d, h, w, O]
    out: Tensor,  # [n, O * prod(kernel) * C / groups], written
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    shape = (g.shape[-1], *kernel, a.shape[-1] // groups)
    weights = out.view(len(out), *shape)  # [n, O, *kernel, C / groups]
    for (i, j, k), block in _blocks(a, g, kernel, stride, padding, dilation, groups):
        weights[:, :, i, j, k] = block


def conv_weight_norms(
    a: Tensor,  # [n, D, H, W, C]
    g: Tensor,  # [n, d, h, w, O]
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # [n] float64
    norms = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for _, block in _blocks(a, g, kernel, stride, padding, dilation, groups):
        norms += block.double().square().sum((1, 2))
    return norms


def _blocks(
    a: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:  # kernel offset, [n, O, C / groups]
    n, positions = a.shape[0], g.shape[1:4]
    padded = _padded(a, positions, kernel, stride, padding, dilation)
    by_group = g.reshape(n, positions.numel(), groups, -1) if g.numel() else None
    for offset in product(*(range(k) for k in kernel)):
        if by_group is None or a.numel() == 0:
            yield offset, a.new_zeros(n, g.shape[-1], a.shape[-1] // groups)
            continue
        seen = padded
        for d in range(3):
            first = offset[d] * dilation[d]
            last = first + (positions[d] - 1) * stride[d]
            index = torch.arange(first, last + 1, stride[d], device=a.device)
            seen = seen.index_select(d + 1, index)
        seen = seen.reshape(n, positions.numel(), groups, -1)  # [n, P, groups, C / groups]
        yield offset, torch.einsum("npgo,npgc->ngoc", by_group, seen).flatten(1, 2)


def _padded(
    a: Tensor,
    positions: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`a` with the zeros before and after it that some position reads, and nothing more."""
    reach = [
        max(0, (positions[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1) for d in range(3)
    ]
    padded = a.new_zeros(a.shape[0], *reach, a.shape[-1])
    inside = padded[:, padding[0] :, padding[1] :, padding[2] :]
    depth, height, width = (min(inside.shape[d], a.shape[d]) for d in (1, 2, 3))
    inside[:, :depth, :height, :width] = a[:, :depth, :height, :width]
    return padded
