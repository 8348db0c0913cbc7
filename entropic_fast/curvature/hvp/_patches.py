"""Convolutions of few positions and many channels as matrix products, on a CPU.

With patches X [n positions, C taps] of the input and weights W [O, C taps], in the parameter's
order, the output is X W^T: no library reorders the weights, their K tangents and their K gradients,
which are larger than the images.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ._jvp_rules import matrix_products
from ._node import NodeContext

# The most elements that patches may have, in those of the weight.
RATIO = 1.0


class PatchConvolution:
    """A convolution of images in two dimensions, [n, C, H, W] to [n, O, H', W']."""

    def __init__(self, ctx: NodeContext, x: fx.Node, weight: Tensor, geometry: Any) -> None:
        self._ctx, self._x, self._geometry = ctx, x, geometry
        self.weight = weight.reshape(len(weight), -1)
        self._shape: torch.Size = x.meta["val"].shape
        self._kernel = weight.shape[2:]
        self._out = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                self._shape[2:], geometry.padding, geometry.dilation, self._kernel, geometry.stride,
                strict=True,
            )
        ]  # fmt: skip

    def patches(self) -> Tensor:
        """Patches of the input at the point, [n positions, C taps]; shared by both passes."""
        # Other convolutions may read the same input.
        key = tuple(self._kernel), self._geometry
        return self._ctx.cached(
            key, lambda: self.patches_of(self._ctx.value(self._x)), owner=("patches", self._x)
        )

    def patches_of(self, x: Tensor) -> Tensor:
        """Patches of images [m, C, H, W]: [m positions, C taps]."""
        (ph, pw), geometry = self._geometry.padding, self._geometry
        windows = functional.pad(x, [pw, pw, ph, ph])
        for axis, (kernel, dilation, stride) in enumerate(
            zip(self._kernel, geometry.dilation, geometry.stride, strict=True)
        ):
            windows = windows.unfold(2 + axis, (kernel - 1) * dilation + 1, stride)
        dh, dw = geometry.dilation
        windows = windows[..., ::dh, ::dw]  # [m, C, H', W', taps]
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.weight.shape[1])

    def tangent_patches(self, x: Tensor) -> Tensor:
        """Those of K tangents [K, n, C, H, W], [K, n positions, C taps]."""
        return self.patches_of(x.flatten(0, 1)).view(len(x), -1, self.weight.shape[1])

    def positions(self, g: Tensor) -> Tensor:
        """[..., n, O, H', W'] as [..., n positions, O]."""
        rows = g.movedim(-3, -1)
        return rows.reshape(*g.shape[:-4], -1, g.shape[-3])

    def images(self, rows: Tensor) -> Tensor:
        """The inverse of `positions`, with channels last."""
        lead = rows.shape[:-2]
        return rows.view(*lead, self._shape[0], *self._out, rows.shape[-1]).movedim(-1, -3)

    def folded(self, columns: Tensor) -> Tensor:
        """Cotangents [..., n positions, C taps] of patches as those of images [..., n, C, H, W]."""
        geometry, lead = self._geometry, columns.shape[:-2]
        each = columns.reshape(-1, prod(self._out), columns.shape[-1]).mT
        images = functional.fold(
            each, self._shape[2:], self._kernel, geometry.dilation, geometry.padding,
            geometry.stride,
        )  # fmt: skip
        images = images.contiguous(memory_format=torch.channels_last)
        return images.unflatten(0, (*lead, self._shape[0])) if lead else images

    # -- the operation, and its backward pass ------------------------------------------------

    def value(self, bias: Tensor | None) -> Tensor:
        rows = self.patches() @ self.weight.T
        return self.images(rows if bias is None else rows.add_(bias))

    def jvp(self, tx: Tensor | None, tw: Tensor | None) -> Tensor | None:
        """The tangent in input and weight, [K, n, O, H', W']."""
        rows = None
        if tx is not None:
            rows = matrix_products(self.tangent_patches(tx), self.weight.T)
        if tw is not None:
            rows = matrix_products(self.patches(), tw.flatten(2).mT, rows)
        return None if rows is None else self.images(rows)

    def input_gradient(self, g: Tensor) -> Tensor:
        return self.folded(self.positions(g) @ self.weight)

    def input_gradient_tangent(self, g: Tensor, tg: Tensor | None, tw: Tensor | None) -> Tensor:
        """The tangent of the gradient in the input, [K, n, C, H, W]."""
        columns = None
        if tg is not None:
            columns = matrix_products(self.positions(tg), self.weight)
        if tw is not None:
            columns = matrix_products(self.positions(g), tw.flatten(2), columns)
        assert columns is not None
        return self.folded(columns)

    def weight_gradient_tangent(self, g: Tensor, tg: Tensor | None, tx: Tensor | None) -> Tensor:
        """The tangent of the gradient in the weight, [K, O, C taps]."""
        out = None
        if tg is not None:
            out = matrix_products(self.positions(tg).mT, self.patches())
        if tx is not None:
            out = matrix_products(self.positions(g).mT, self.tangent_patches(tx), out)
        assert out is not None
        return out

    def mixed_products(self, g: Tensor, tw: Tensor) -> Tensor:
        """Cotangents of patches for g and K weights, [K, n positions, C taps]."""
        return matrix_products(self.positions(g), tw.flatten(2))


def by_patches(ctx: NodeContext, x: int, weight: int, geometry: Any) -> PatchConvolution | None:
    """The convolution as matrix products, where that is faster."""
    node, w = ctx.argument(x), ctx.value(weight)
    shape = node.meta["val"].shape
    plain = not geometry.transposed and geometry.groups == 1 and w.ndim == 4
    if not plain or w.device.type != "cpu" or w.dtype not in (torch.float32, torch.float64):
        return None
    convolution = PatchConvolution(ctx, node, w, geometry)
    patches = shape[0] * prod(convolution._out) * convolution.weight.shape[1]
    return convolution if 0 < patches <= RATIO * w.numel() else None
