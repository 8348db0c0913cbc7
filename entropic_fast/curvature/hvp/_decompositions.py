"""Operations in terms of simpler ones that torch can differentiate twice in forward mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import grid_sampler_2d
from torch.nn import functional

from ..._torch.full_precision import hardsigmoid, weight_norm

aten = torch.ops.aten


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if dtypes in ({torch.float32}, {torch.float64}):
        return NotImplemented  # `transformer/_layer_norm.py` has kernels for these
    dims = list(range(x.ndim - len(shape), x.ndim))
    normal, mean, rstd = _normalized(x, dims, eps)
    if weight is not None:
        normal = normal * weight
    if bias is not None:
        normal = normal + bias
    return normal, mean, rstd


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normal, mean, rstd = _normalized(x.reshape(n, groups, -1), [2], eps)
    return _affine(normal.reshape(x.shape), weight, bias), mean[..., 0], rstd[..., 0]


def batch_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization by the statistics of the batch."""
    normal, mean, rstd = _normalized(x, [0, *range(2, x.ndim)], eps)
    return _affine(normal, weight, bias), mean.flatten(), rstd.flatten()


def _normalized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    # From centered values: the mean square less the squared mean would cancel.
    centered = x - mean
    rstd = ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
    return centered * rstd, mean, rstd


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (normal.ndim - 2)
    if weight is not None:
        normal = normal * weight.view(shape)
    if bias is not None:
        normal = normal + bias.view(shape)
    return normal


def _batch_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    if not training:
        return NotImplemented
    if mean is not None or var is not None:
        return NotImplemented  # would change them
    return batch_statistics(x, w, b, eps)


def _cudnn_batch_norm(x: Tensor, *arguments: Any) -> Any:
    """As on a CPU, so that JVP rules and fused regions see one operation on every device."""
    results = _batch_norm(x, *arguments)
    if results is NotImplemented:
        results = aten.native_batch_norm(x, *arguments)
    return (*results, x.new_empty(0, dtype=torch.uint8))  # cuDNN's workspace


def _lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, x_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One time step of an LSTM, on a GPU a single operation without forward mode."""
    # Products with the weights come before; this is the pointwise remainder.
    gates = x + h
    if x_bias is not None and h_bias is not None:
        gates = gates + x_bias + h_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, gates  # read by torch's backward pass alone


def _gru_cell(
    x: Tensor, h: Tensor, before: Tensor, x_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One time step of a GRU, likewise."""
    if x_bias is not None and h_bias is not None:
        x, h = x + x_bias, h + h_bias
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + z * (before - n), h


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    for dim in expand_a:
        a = a.unsqueeze(dim)
    for dim in expand_b:
        b = b.unsqueeze(dim)
    for dim in expand_c:
        c = c.unsqueeze(dim)
    return (a * b * c).sum(list(summed))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target.dtype).expand(target.shape).clone()


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Without empty tensors [0], which torch joins to any rank and caches start from."""
    kept = [t for t in tensors if t.shape != (0,)]
    if not kept or len(kept) == len(tensors) or all(t.ndim == 1 for t in kept):
        return NotImplemented
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.cat([t.to(dtype) for t in kept], dim)


# A pointwise activation belongs here only if torch lacks forward mode for it or for its backward.
DECOMPOSITIONS: dict[Any, Any] = {
    aten.cat.default: _cat,
    # The second result, norms, is read by torch's backward pass alone.
    aten._weight_norm_interface.default: lambda v, g, dim=0: (weight_norm(v, g, dim), g),
    # Its backward pass has no forward mode.
    aten.mish.default: lambda x: x * functional.softplus(x).tanh(),
    aten.hardsigmoid.default: hardsigmoid,
    aten.grid_sampler_2d.default: grid_sampler_2d,
    aten.copy.default: _copy,
    aten.fill.Tensor: _copy,
    aten._trilinear.default: _trilinear,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: group_norm,
    aten._native_batch_norm_legit.no_stats: lambda x, w, b, _training, _momentum, eps: (
        batch_statistics(x, w, b, eps)
    ),
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_gru_cell.default: _gru_cell,
}


def _global_mean(function: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    def pool(input: Tensor, output_size: Any) -> Tensor:
        if output_size in (1, (1,) * dims, [1] * dims):
            return input.mean(list(range(-dims, 0)), keepdim=True)
        return function(input, output_size)

    return pool


# Functions replaced before capture: with channels last, torch changes the strides of the mean in
# place, which a graph without side effects cannot represent.
FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    function: _global_mean(function, dims)
    for dims, functions in {
        1: (functional.adaptive_avg_pool1d,),
        2: (functional.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d),
        3: (functional.adaptive_avg_pool3d, torch._C._nn.adaptive_avg_pool3d),
    }.items()
    for function in functions
}
