"""Checks of the arguments of family `projected_step`."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid, shown

DTYPES = (torch.float32, torch.float64)


def refuse_autograd(theta: Tensor) -> None:
    if theta.requires_grad and torch.is_grad_enabled():
        raise invalid(
            "theta",
            "a tensor that autograd does not follow",
            "one with requires_grad=True",
            "call under torch.no_grad() or pass theta.detach()",
        )


def _check_theta(theta: Tensor) -> None:
    if theta.dim() != 2:
        raise invalid("theta", "shape [R, P] or [P]", f"shape {list(theta.shape)}")
    if theta.dtype not in DTYPES:
        raise invalid("theta", "dtype float32 or float64", str(theta.dtype), "convert it first")


def _check_fits(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise invalid(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise invalid(name, f"dtype {dtype}", str(tensor.dtype), f"pass {name}.to({dtype})")
    if tensor.device != theta.device:
        raise invalid(name, f"device {theta.device} as theta", str(tensor.device), "move it there")
    if not tensor.is_contiguous():
        raise invalid(
            name,
            "a contiguous tensor",
            f"strides {tensor.stride()} for shape {list(shape)}",
            f"pass {name}.contiguous()",
        )


def _check_common(theta: Tensor, lr: Tensor, pivots: Tensor, **state: Tensor) -> None:
    _check_theta(theta)
    replicas, size = theta.shape
    for name, tensor in {"theta": theta, **state}.items():
        _check_fits(name, tensor, theta, theta.dtype, replicas, size)
    _check_fits("lr", lr, theta, torch.float64, replicas)
    if pivots.dim() != 2:
        raise invalid("pivots", f"shape [M, {size}]", f"shape {list(pivots.shape)}")
    _check_fits("pivots", pivots, theta, theta.dtype, pivots.shape[0], size)


def _check_at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise invalid(name, "a finite number of at least 0", shown(value))


def check_sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    pivots: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    _check_common(theta, lr, pivots, grad=grad)
    if momentum != 0 or momentum_buffer.numel() != 0:
        _check_fits("momentum_buffer", momentum_buffer, theta, theta.dtype, *theta.shape)
    _check_at_least_zero(momentum=momentum, weight_decay=weight_decay)
    if not -float("inf") < dampening < float("inf"):
        raise invalid("dampening", "a finite number", shown(dampening))
    if nesterov and (momentum <= 0 or dampening != 0):
        raise invalid(
            "nesterov",
            "momentum > 0 and dampening 0",
            f"momentum {momentum} and dampening {dampening}",
        )


def check_adam(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    pivots: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    _check_common(theta, lr, pivots, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_fits("step", step, theta, torch.int64, theta.shape[0])
    _check_at_least_zero(eps=eps, weight_decay=weight_decay)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise invalid(name, "a number in [0, 1)", shown(beta))


def check_project(theta: Tensor, products: Tensor, pivots: Tensor, segment_squares: Tensor) -> None:
    _check_theta(theta)
    replicas, size = theta.shape
    _check_fits("theta", theta, theta, theta.dtype, replicas, size)
    if pivots.dim() != 2 or pivots.shape[0] < 2:
        raise invalid(
            "pivots",
            f"shape [M, {size}] with M >= 2",
            f"shape {list(pivots.shape)}",
            "a path has at least one segment",
        )
    count = pivots.shape[0]
    _check_fits("pivots", pivots, theta, theta.dtype, count, size)
    _check_fits("products", products, theta, torch.float64, replicas, 2, count)
    _check_fits("segment_squares", segment_squares, theta, torch.float64, count - 1)


def check_near(
    theta: Tensor,
    pivots: Tensor,
    near: Tensor | None,
    between: Tensor | None = None,
    projects: bool = False,
) -> None:
    if near is None:
        return
    count = pivots.shape[0]
    _check_fits("near", near, theta, torch.int64, theta.shape[0])
    if near.device.type == "cpu" and len(near):
        low, high = int(near.min()), int(near.max())
        if low < 0 or high > count - 2:
            raise invalid("near", f"segments 0 to {count - 2}", f"{low} to {high}")
    if projects:
        if between is None:
            raise invalid(
                "between", "a tensor, as near is given", "None", "pass pivot_squares(pivots)"
            )
        _check_fits("between", between, theta, torch.float64, count, count)


def check_overlap(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Contiguous tensors share memory exactly when their address ranges meet."""
    spans = [
        (name, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name in written)
        for name, t in {**written, **read}.items()
        if t.numel() > 0
    ]
    for (a, a_start, a_end, a_written), (b, b_start, b_end, b_written) in combinations(spans, 2):
        if (a_written or b_written) and a_start < b_end and b_start < a_end:
            raise invalid(
                a, f"memory of its own, apart from {b}", "tensors that overlap", "clone one"
            )
