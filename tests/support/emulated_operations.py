"""Operations of the emulated GPU that the CPU does not have, or that CUDA chooses otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "emulated"
aten = torch.ops.aten


def _cudnn_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    found = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return (*found, torch.zeros(0, dtype=torch.uint8))


def _cudnn_batch_norm_backward(
    x: Any, g: Any, weight: Any, mean: Any, var: Any, saved: Any, rstd: Any, eps: float, _: Any
) -> Any:
    wanted = [True] * 3
    return aten.native_batch_norm_backward(g, x, weight, mean, var, saved, rstd, True, eps, wanted)


def _lstm_cell(x: Any, h: Any, cx: Any, x_bias: Any = None, h_bias: Any = None) -> Any:
    """A step; the backward pass gets the gates activated: input, forget, cell, output."""
    gates = x + h if x_bias is None else x + h + x_bias + h_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    grad_hy: Any, grad_cy: Any, cx: Tensor, cy: Tensor, gates: Tensor, has_bias: bool
) -> Any:
    i, f, g, o = gates.chunk(4, 1)
    t = cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = grad_hy * o * (1 - t * t) + (0 if grad_cy is None else grad_cy)
    moved = [
        grad_c * g * i * (1 - i),
        grad_c * cx * f * (1 - f),
        grad_c * i * (1 - g * g),
        grad_hy * t * o * (1 - o),
    ]
    grad_gates = torch.cat(moved, 1)
    return grad_gates, grad_c * f, grad_gates.sum(0) if has_bias else None


def _gru_cell(x: Any, h: Any, hx: Any, x_bias: Any = None, h_bias: Any = None) -> Any:
    if x_bias is not None:
        x, h = x + x_bias, h + h_bias
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def _gru_cell_backward(grad_hy: Tensor, workspace: Tensor, has_bias: bool) -> Any:
    r, z, n, hx, hn = workspace.chunk(5, 1)
    moved_z = grad_hy * (hx - n) * z * (1 - z)
    moved_n = grad_hy * (1 - z) * (1 - n * n)
    moved_r = moved_n * hn * r * (1 - r)
    grad_x = torch.cat([moved_r, moved_z, moved_n], 1)
    grad_h = torch.cat([moved_r, moved_z, moved_n * r], 1)
    biases = (grad_x.sum(0), grad_h.sum(0)) if has_bias else (None, None)
    return grad_x, grad_h, grad_hy * z, *biases


KERNELS: dict[Any, Any] = {
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    aten._efficientzerotensor.default: lambda size, dtype=None, **_: torch.zeros(size, dtype=dtype),
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.cudnn_batch_norm_backward.default: _cudnn_batch_norm_backward,
}


class _OfCudnn(torch.autograd.Function):
    """What cuDNN's recurrent layers returned, with the derivatives that they have."""

    @staticmethod
    def forward(ctx: Any, train: bool, *outputs: Tensor) -> Any:
        ctx.train = train
        return tuple(t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if not ctx.train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        if torch.is_grad_enabled():
            raise RuntimeError("Double backwards is not supported for CuDNN RNNs")
        return None, *gradients


def recurrent(operation: Any) -> Any:
    """A recurrent layer as torch chooses it on CUDA: cuDNN's, where it is enabled."""
    train_at = next(n for n, a in enumerate(operation._schema.arguments) if a.name == "train")

    def chosen(*args: Any) -> Any:
        outputs = operation._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args)
        if not torch._C._get_cudnn_enabled() or not torch.is_grad_enabled():
            return outputs
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError("cudnn RNN has neither batching rule nor forward derivative")
        return _OfCudnn.apply(args[train_at], *outputs)

    return chosen


_batch_norm = torch.batch_norm


def chosen_batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float, enabled: bool,
) -> Tensor:  # fmt: skip
    """Batch normalization as torch chooses it on CUDA: cuDNN's, for images with weights."""
    inner = x
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    has_statistics = mean is not None and var is not None
    fits = x.ndim >= 3 and weight is not None and bias is not None
    if inner.device.type == NAME and fits and (has_statistics or (training and mean is None)):
        x = x.contiguous()
        return aten.cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]
    return _batch_norm(x, weight, bias, mean, var, training, momentum, eps, enabled)


def in_half_precision(operation: Any) -> Any:
    """An operation under autocast, in the lower precision."""

    def rounded(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        low = [
            t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(*low)

    return rounded


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
