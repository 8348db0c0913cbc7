"""Functions of torch whose higher derivatives are wrong or missing, by their formulas.

A model or loss that takes a derivative in its inputs makes a Hessian of the loss a third derivative
of what it calls; docs/numerics.md has the table of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .._utils import checks
from .full_precision import hardsigmoid, weight_norm


class AnyOrder(TorchFunctionMode):
    """Within it, functions in FORMULAS use formulas that torch differentiates rightly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling():  # which cannot trace these functions
            func = FORMULAS.get(func, func)
        return func(*args, **(kwargs or {}))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in checks.HALF else x


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over dims, in float32 or more as in torch."""
    wide = _wide(x)
    centered = wide - wide.mean(dims, keepdim=True)
    scale = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    return (centered * scale).to(x.dtype)


def _last(shape: Sequence[int]) -> list[int]:
    return list(range(-len(shape), 0))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x weight + bias, along the second axis."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    if tuple(input.shape[input.ndim - len(normalized_shape) :]) != tuple(normalized_shape):
        return functional.layer_norm(input, list(normalized_shape), weight, bias, eps)  # raises
    normalized = _normalized(input, _last(normalized_shape), eps)
    normalized = normalized if weight is None else normalized * weight
    return normalized if bias is None else normalized + bias


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = _last(normalized_shape)
    wide = _wide(input)
    mean = wide.mean(dims, keepdim=True)
    rstd = ((wide - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return layer_norm(input, normalized_shape, weight, bias, eps), mean, rstd


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    wide = _wide(input)
    least = torch.finfo(input.dtype).eps if eps is None else eps
    dims = _last(normalized_shape)
    normalized = (wide * (wide.square().mean(dims, keepdim=True) + least).rsqrt()).to(input.dtype)
    return normalized if weight is None else normalized * weight


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if input.ndim < 2 or input.shape[1] % num_groups or input[:1].numel() <= num_groups:
        return functional.group_norm(input, num_groups, weight, bias, eps)  # rejects most
    groups = input.reshape(len(input), num_groups, -1)
    return _affine(_normalized(groups, [2], eps).reshape(input.shape), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        if running_mean is not None or input.numel() <= input.shape[1]:
            with torch.no_grad():  # for the update; or for what it raises
                functional.batch_norm(
                    input.detach(), running_mean, running_var, None, None, True, momentum, eps
                )
        normalized = _normalized(input, [0, *range(2, input.ndim)], eps)
    else:
        if running_mean is None or running_var is None:
            return functional.batch_norm(input, running_mean, running_var)  # raises
        scale = (running_var + eps).rsqrt()
        centered = _affine(_wide(input), None, -running_mean)
        normalized = _affine(centered, scale, None).to(input.dtype)
    return _affine(normalized, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None or input[:1, :1].numel() <= 1:
        with torch.no_grad():
            functional.instance_norm(
                input.detach(), running_mean, running_var, None, None, True, momentum, eps
            )
    return _affine(_normalized(input, list(range(2, input.ndim)), eps), weight, bias)


def _called_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _called_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.conv_transpose*`, which lacks a third derivative where torch itself pads the output."""

    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        axes = weight.ndim - 2
        before, extra = (
            [value] * axes if isinstance(value, int) else [*value] * (axes // len(value))
            for value in (padding, output_padding)
        )
        if not any(extra):
            return function(input, weight, bias, stride, padding, 0, groups, dilation)
        full = function(input, weight, None, stride, 0, 0, groups, dilation)
        ends = [(-p, e - p) for p, e in zip(before, extra, strict=True)]
        padded = functional.pad(full, [side for pair in reversed(ends) for side in pair])
        return padded if bias is None else padded + bias.view(-1, *[1] * axes)

    return convolution


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu`, whose gradient has no forward mode in torch."""
    x = input.clone() if inplace else input  # which the backward pass needs
    return _placed(x * torch.sigmoid(x), input, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    x = input.clone() if inplace else input
    return _placed(x * functional.softplus(x).tanh(), input, inplace)


def _placed(result: Tensor, input: Tensor, inplace: bool) -> Tensor:
    return input.copy_(result) if inplace else result


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """`F.pdist`, whose third derivative is NaN in torch for p = 2."""
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _lengths(input[i] - input[j]) if p == 2 else functional.pdist(input, p)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """`torch.cdist`, whose derivatives are NaN in torch for p = 2 and a distance of 0."""
    if p != 2 or x1.shape[-1] != x2.shape[-1]:
        return torch.cdist(x1, x2, p)
    return _lengths(x1[..., :, None, :] - x2[..., None, :, :])


def _lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths [...] of vectors [..., n]; at 0 all derivatives are 0, as torch's first."""
    squares = vectors.square().sum(-1)
    is_zero = squares == 0
    return torch.where(is_zero, 1, squares).sqrt() * ~is_zero


# By the names in F, and by those that F calls.
FORMULAS: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    functional.group_norm: group_norm,
    torch.group_norm: group_norm,
    functional.batch_norm: batch_norm,
    functional.instance_norm: instance_norm,
    torch.batch_norm: _called_batch_norm,
    torch.instance_norm: _called_instance_norm,
    **{
        function: _transposed(function)
        for function in (
            functional.conv_transpose1d,
            functional.conv_transpose2d,
            functional.conv_transpose3d,
        )
    },
    functional.hardsigmoid: hardsigmoid,
    functional.silu: silu,
    functional.mish: mish,
    torch._weight_norm: weight_norm,
    torch.pdist: pdist,
    functional.pdist: pdist,
    torch.cdist: cdist,
}
