"""Arguments of family `projected_step`, and what is required of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid, shown
from entropic_fast.ops._checks import check_contiguous, check_device, check_dtype, check_shape


class SgdStep(NamedTuple):
    theta: Tensor  # [R, P] float32 or float64, updated
    grad: Tensor  # [R, P]
    momentum_buffer: Tensor  # [R, P], updated; not touched (and may be empty) if momentum is 0
    lr: Tensor  # [R] float64
    pivots: Tensor  # [M, P]
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    first: bool  # no step was taken before: the buffer is filled, not read
    near: Tensor | None = None  # [R] int64; other segments' products may be left out


class AdamStep(NamedTuple):
    theta: Tensor  # [R, P] float32 or float64, updated
    grad: Tensor  # [R, P]
    exp_avg: Tensor  # [R, P], updated
    exp_avg_sq: Tensor  # [R, P], updated
    step: Tensor  # [R] int64, counted up; implementations get it with this step counted
    lr: Tensor  # [R] float64
    pivots: Tensor  # [M, P]
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    near: Tensor | None = None  # [R] int64


class ProjectStep(NamedTuple):
    theta: Tensor  # [R, P] float32 or float64, updated
    products: Tensor  # [R, 2, M] float64, of this theta; completed where `near` left some out
    pivots: Tensor  # [M, P], M >= 2
    segment_squares: Tensor  # [M - 1] float64
    near: Tensor | None = None  # [R] int64, as for the products
    between: Tensor | None = None  # [M, M] float64, squared distances of pivots; with `near`


def new_products(a: SgdStep | AdamStep) -> Tensor:  # [R, 2, M]
    return a.theta.new_empty((a.theta.shape[0], 2, a.pivots.shape[0]), dtype=torch.float64)


def new_positions(a: ProjectStep) -> tuple[Tensor, Tensor, Tensor]:  # segment, t, distance: [R]
    t = a.theta.new_empty(a.theta.shape[0], dtype=torch.float64)
    return torch.empty_like(t, dtype=torch.int64), t, torch.empty_like(t)


def check_sgd(a: SgdStep) -> None:
    _check_common(a.theta, a.lr, a.pivots, grad=a.grad)
    if a.momentum != 0 or a.momentum_buffer.numel() != 0:
        _check_fits("momentum_buffer", a.momentum_buffer, a.theta, a.theta.dtype, *a.theta.shape)
    _check_at_least_zero(momentum=a.momentum, weight_decay=a.weight_decay)
    if not -float("inf") < a.dampening < float("inf"):
        raise invalid("dampening", "a finite number", shown(a.dampening))
    if a.nesterov and (a.momentum <= 0 or a.dampening != 0):
        raise invalid(
            "nesterov",
            "momentum > 0 and dampening 0",
            f"momentum {a.momentum} and dampening {a.dampening}",
        )


def check_adam(a: AdamStep) -> None:
    _check_common(a.theta, a.lr, a.pivots, grad=a.grad, exp_avg=a.exp_avg, exp_avg_sq=a.exp_avg_sq)
    _check_fits("step", a.step, a.theta, torch.int64, a.theta.shape[0])
    _check_at_least_zero(eps=a.eps, weight_decay=a.weight_decay)
    for name, beta in (("beta1", a.beta1), ("beta2", a.beta2)):
        if not 0 <= beta < 1:
            raise invalid(name, "a number in [0, 1)", shown(beta))


def check_project(a: ProjectStep) -> None:
    theta, pivots = a.theta, a.pivots
    _check_theta(theta)
    if pivots.dim() != 2 or pivots.shape[0] < 2:
        raise invalid(
            "pivots",
            f"shape [M, {theta.shape[1]}] with M >= 2",
            f"shape {list(pivots.shape)}",
            "a path has at least one segment",
        )
    replicas, count = theta.shape[0], pivots.shape[0]
    _check_fits("pivots", pivots, theta, theta.dtype, count, theta.shape[1])
    _check_fits("products", a.products, theta, torch.float64, replicas, 2, count)
    _check_fits("segment_squares", a.segment_squares, theta, torch.float64, count - 1)


def check_near(a: SgdStep | AdamStep | ProjectStep) -> None:
    """Checks of `near` and `between`, which read numbers."""
    if a.near is None:
        return
    count = a.pivots.shape[0]
    _check_fits("near", a.near, a.theta, torch.int64, a.theta.shape[0])
    if a.near.device.type == "cpu" and len(a.near):
        low, high = int(a.near.min()), int(a.near.max())
        if low < 0 or high > count - 2:
            raise invalid("near", f"segments 0 to {count - 2}", f"{low} to {high}")
    if isinstance(a, ProjectStep):
        if a.between is None:
            raise invalid(
                "between", "a tensor, as near is given", "None", "pass pivot_squares(pivots)"
            )
        _check_fits("between", a.between, a.theta, torch.float64, count, count)


def _check_theta(theta: Tensor) -> None:
    if theta.dim() != 2:
        raise invalid("theta", "shape [R, P] or [P]", f"shape {list(theta.shape)}")
    check_dtype("theta", theta)
    check_contiguous(theta=theta)


def _check_common(theta: Tensor, lr: Tensor, pivots: Tensor, **state: Tensor) -> None:
    _check_theta(theta)
    replicas, size = theta.shape
    for name, tensor in state.items():
        _check_fits(name, tensor, theta, theta.dtype, replicas, size)
    _check_fits("lr", lr, theta, torch.float64, replicas)
    if pivots.dim() != 2:
        raise invalid("pivots", f"shape [M, {size}]", f"shape {list(pivots.shape)}")
    _check_fits("pivots", pivots, theta, theta.dtype, pivots.shape[0], size)


def _check_fits(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if (
        tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == theta.device
        and tensor.is_contiguous()
    ):
        return  # one test for all: an update of a small network takes no longer than its checks
    check_shape(name, tensor, *shape)
    if tensor.dtype != dtype:
        raise invalid(name, f"dtype {dtype}", str(tensor.dtype), f"pass {name}.to({dtype})")
    check_device(name, tensor, "theta", theta)
    check_contiguous(**{name: tensor})


def _check_at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise invalid(name, "a finite number of at least 0", shown(value))
