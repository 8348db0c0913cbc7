"""Batch, group, instance, layer and RMS normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ....ops.norm_example_grads import affine_grads, batch_norm_backward
from ._base import Backward, DenseGrad, LayerRule, WeightBiasGrads, apart, at_least_float32
from ._registry import layer_rule


class BatchNorm(LayerRule):
    """`F.batch_norm` with stored statistics: x is scaled and shifted by constants per channel."""

    # For a single image, as in a chunk of one example, torch returns a wrong gradient if the
    # incoming one has channels last.
    correct_under_vmap = False

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.statistics, self.eps = (mean, variance), eps

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, variance = self.statistics
        return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    def vmap_safe(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, variance, scale, shift = (
            None if t is None else at_least_float32((t,))[0].view(-1, *[1] * (x.ndim - 2))
            for t in (*self.statistics, weight, bias)
        )
        assert mean is not None and variance is not None
        out = (at_least_float32((x,))[0] - mean) * (variance + self.eps).rsqrt()
        out = out if scale is None else out * scale
        return (out if shift is None else out + shift).to(x.dtype)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # Stored statistics treat all images alike: examples and images are one axis.
        return self.reference(x.flatten(0, 1), weight, bias), ()

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return apart(out, x.shape[:2])

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        inputs, gradients = at_least_float32((at.x, self.shaped(at.g, at.x)))
        mean, variance = at_least_float32(self.statistics)
        rstd = (variance.to(inputs.dtype) + self.eps).rsqrt()
        scale = torch.ones_like(rstd) if at.weight is None else at.weight.to(inputs.dtype)
        last = inputs.movedim(2, -1)
        flat = last.flatten(1, -2)
        x_gradient, *rows = batch_norm_backward(
            flat, gradients.movedim(2, -1).reshape(flat.shape), mean.to(inputs.dtype), rstd, scale
        )
        gradient = x_gradient.view(last.shape).movedim(-1, 2).to(at.x.dtype) if at.need_x else None
        return gradient, wanted_rows(rows, at.wanted)


class GroupNorm(LayerRule):
    """`F.group_norm`, and with one channel per group `F.instance_norm`."""

    def __init__(
        self, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        self.x, self.groups, self.weight, self.bias, self.eps = x, groups, weight, bias, eps

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.group_norm(x, self.groups, weight, bias, self.eps)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        images = x.flatten(0, 1).contiguous()
        # It also returns the statistics that the backward pass needs.
        out, mean, rstd = torch.native_group_norm(
            images, weight, bias, *self._sizes(images), self.groups, self.eps
        )
        return out, (images, mean, rstd)

    def shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return apart(out, x.shape[:2])

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        images, mean, rstd = at.saved
        out = at.g.contiguous()
        gradient = None
        if at.need_x:
            gradient = torch.ops.aten.native_group_norm_backward(
                out, images, mean, rstd, at.weight, *self._sizes(images), self.groups,
                (True, False, False),
            )[0]  # fmt: skip
            gradient = self.shaped(gradient, at.x)
        per_group = images.shape[1] // self.groups
        inputs, gradients, mean, rstd = at_least_float32((images, out, mean, rstd))
        rows = affine_grads(
            inputs.reshape(*inputs.shape[:2], -1).transpose(1, 2),
            gradients.reshape(*inputs.shape[:2], -1).transpose(1, 2),
            *(t.repeat_interleave(per_group, 1)[:, None].to(inputs.dtype) for t in (mean, rstd)),
        )
        return gradient, wanted_rows([apart(r, at.x.shape[:2]).sum(1) for r in rows], at.wanted)

    @staticmethod
    def _sizes(images: Tensor) -> tuple[int, int, int]:
        return len(images), images.shape[1], math.prod(images.shape[2:])


class LayerNorm(LayerRule):
    """`F.layer_norm`, and `F.rms_norm`, which has no mean and no bias."""

    def __init__(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        centered: bool = True,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.shape, self.eps, self.centered = list(shape), eps, centered

    def reference(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.centered:
            return functional.rms_norm(x, self.shape, weight, self.eps)
        assert self.eps is not None
        return functional.layer_norm(x, self.shape, weight, bias, self.eps)

    def backward(self, at: Backward) -> tuple[Tensor | None, WeightBiasGrads]:
        n, width = len(at.x), math.prod(self.shape)
        inputs, gradients = (
            t.reshape(n, math.prod(at.x.shape[1 : at.x.ndim - len(self.shape)]), width)
            for t in at_least_float32((at.x, at.g))
        )
        eps = default_eps(at.x.dtype, at.x.device.type) if self.eps is None else self.eps
        mean = inputs.mean(2, keepdim=True) if self.centered else inputs.new_zeros(1, 1, 1)
        rstd = ((inputs - mean).square().mean(2, keepdim=True) + eps).rsqrt()
        gradient = None
        if at.need_x:
            scaled = gradients
            if at.weight is not None:
                scaled = gradients * at.weight.reshape(-1).to(gradients.dtype)
            normal = (inputs - mean) * rstd
            # What the mean and the variance of x remove is projected out of the gradient.
            gradient = scaled - normal * (scaled * normal).mean(2, keepdim=True)
            if self.centered:
                gradient -= scaled.mean(2, keepdim=True)
            gradient = (gradient * rstd).view(at.x.shape).to(at.x.dtype)
        return gradient, wanted_rows(affine_grads(inputs, gradients, mean, rstd), at.wanted)


@lru_cache
def default_eps(dtype: torch.dtype, device: str) -> float:
    """eps of `F.rms_norm(eps=None)`: in half precision it depends on how torch was built."""
    if dtype not in (torch.float16, torch.bfloat16):
        return torch.finfo(dtype).eps
    # 0.01 is normalized to 1 with the eps of float32 (1e-7), to 0.3 or less with that of half.
    out = functional.rms_norm(torch.full((1,), 0.01, dtype=dtype, device=device), [1])
    return torch.finfo(torch.float32 if float(out) > 0.9 else dtype).eps


def wanted_rows(rows: Sequence[Tensor], wanted: tuple[bool, bool]) -> WeightBiasGrads:
    """Gradients of weight and bias from their rows [n, C]."""
    weight, bias = (DenseGrad(r) if w else None for r, w in zip(rows, wanted, strict=True))
    return weight, bias


@layer_rule(functional.batch_norm)
def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> LayerRule | None:  # fmt: skip
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return None
    return BatchNorm(input, running_mean, running_var, weight, bias, eps)


@layer_rule(functional.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerRule | None:  # fmt: skip
    return GroupNorm(input, num_groups, weight, bias, eps) if input.ndim >= 2 else None


@layer_rule(functional.instance_norm)
def _instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> LayerRule | None:  # fmt: skip
    if input.ndim < 3:
        return None
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None or running_var is not None:
        return None
    return GroupNorm(input, input.shape[1], weight, bias, eps)


@layer_rule(functional.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> LayerRule:  # fmt: skip
    return LayerNorm(input, normalized_shape, weight, bias, eps)


@layer_rule(functional.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> LayerRule:  # fmt: skip
    return LayerNorm(input, normalized_shape, weight, None, eps, centered=False)
