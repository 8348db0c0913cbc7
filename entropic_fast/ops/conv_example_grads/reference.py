"""Per-example weight gradients of a convolution in plain PyTorch, one kernel offset at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from entropic_fast.ops.conv_example_grads.checks import ConvWeightGrads, ConvWeightNorms


def conv_weight_grads(c: ConvWeightGrads) -> None:
    shape = (c.g.shape[-1], *c.kernel, c.a.shape[-1] // c.groups)
    weights = c.out.view(len(c.out), *shape)  # [n, O, *kernel, C / groups]
    for (i, j, k), block in _blocks(c):
        weights[:, :, i, j, k] = block


def conv_weight_norms(c: ConvWeightNorms) -> Tensor:  # [n]
    norms = torch.zeros(c.a.shape[0], dtype=torch.float64, device=c.a.device)
    for _, block in _blocks(c):
        norms += block.double().square().sum((1, 2))
    return norms


def _blocks(
    c: ConvWeightGrads | ConvWeightNorms,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:  # kernel offset, [n, O, C / groups]
    a, g, groups = c.a, c.g, c.groups
    n, positions = a.shape[0], g.shape[1:4]
    padded = _padded(c)
    by_group = g.reshape(n, positions.numel(), groups, -1) if g.numel() else None
    for offset in product(*(range(k) for k in c.kernel)):
        if by_group is None or a.numel() == 0:
            yield offset, a.new_zeros(n, g.shape[-1], a.shape[-1] // groups)
            continue
        seen = padded
        for d in range(3):
            first = offset[d] * c.dilation[d]
            last = first + (positions[d] - 1) * c.stride[d]
            index = torch.arange(first, last + 1, c.stride[d], device=a.device)
            seen = seen.index_select(d + 1, index)
        seen = seen.reshape(n, positions.numel(), groups, -1)  # [n, P, groups, C / groups]
        yield offset, torch.einsum("npgo,npgc->ngoc", by_group, seen).flatten(1, 2)


def _padded(c: ConvWeightGrads | ConvWeightNorms) -> Tensor:
    """`a` with the zeros before and after it that some position reads, and nothing more."""
    a, padding = c.a, c.padding
    sizes = zip(c.g.shape[1:4], c.kernel, c.stride, c.dilation, strict=True)
    reach = [max(0, (p - 1) * stride + (k - 1) * dilation + 1) for p, k, stride, dilation in sizes]
    padded = a.new_zeros(a.shape[0], *reach, a.shape[-1])
    inside = padded[:, padding[0] :, padding[1] :, padding[2] :]
    depth, height, width = (min(inside.shape[d], a.shape[d]) for d in (1, 2, 3))
    inside[:, :depth, :height, :width] = a[:, :depth, :height, :width]
    return padded
