"""Family `projected_step`: the fused projection step of projected SGD, for R replicas at once.

Pass one (`sgd_step`, `adam_step`) advances the parameters exactly as `torch.optim` does and, while
they are in cache, takes the products that projection onto the path's polyline needs. Pass two
(`project_step`) finds each replica's nearest point of the polyline from those products and writes
it into the parameters. Neither synchronizes with a GPU. Between projections pass no pivots: then
pass one is a plain optimizer step.

The products of theta with pivots p_0 ... p_{M-1} are

    products[r, 0, m] = |theta_r - p_m|^2
    products[r, 1, m] = <theta_r - p_m, p_{m+1} - p_m>        (0 for the last pivot)

as float64 sums of differences taken in float64. Inner products with the pivots themselves and a
Gram matrix would be fewer, but cancel: their error is that of |theta|^2. Here, with u = 1.1e-16
and g = 600 u (at most 512 + 15 terms in sequence, then trees), the errors are at most

    g |theta - p_m|^2   and   g |theta - p_m| |p_{m+1} - p_m|,

so a position t on segment m is off by at most about 2 g |theta - p_m| / |p_{m+1} - p_m|, and
squared distances are compared to about 4 g |theta - p_m|^2. Products outside float64's range
(about 1e154 in theta) give NaN, as NaN and infinity in theta do.

Results do not depend on the number of threads, and are the same bits run after run on one backend.

Between two projections a replica moves little, so it is enough to take products with the two
pivots of the segment it was on (`near`). `project_step` then proves that no other segment is as
near, or takes the products that it cannot do without: with x the nearest point of that segment, at
distance d, a segment that keeps farther than 2 d from x is farther than d from theta by the
triangle inequality, and its distance from x follows from the pivots' squared distances from each
other alone. Results are those of all products, bit for bit. The C++ backend does so; the others
take all products.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._dispatch import undispatched
from entropic_fast.ops.backend import backend_for, implementation, register_family
from entropic_fast.ops.projected_step.checks import (
    check_adam,
    check_near,
    check_overlap,
    check_project,
    check_sgd,
    refuse_autograd,
)

FAMILY = "projected_step"

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.ops.projected_step.reference",
        "cpp": "entropic_fast.ops.projected_step.native",
        "cuda": "entropic_fast.ops.projected_step.native",
        "triton": "entropic_fast.ops.projected_step.triton",
    },
    writes={"sgd_step": (0, 2), "adam_step": (0, 2, 3, 4), "project_step": (0, 1)},
    several=("sgd_step", "adam_step", "project_step"),  # sums come after the update or the move
)


# ---- public functions ----------------------------------------------------------------------------


def sgd_step(
    theta: Tensor,  # [R, P] or [P], updated in place
    grad: Tensor,  # like theta
    momentum_buffer: Tensor | None = None,  # like theta, updated in place
    *,
    lr: float | Tensor,  # number or [R] float64
    pivots: Tensor | None = None,  # [M, P]
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    near: Tensor | None = None,  # [R] int64
) -> Tensor:  # [R, 2, M] or [2, M] float64
    """One step of `torch.optim.SGD` in place, and the products that projection needs.

    `first` says that no step was taken before: the momentum buffer is then filled, not read.
    Without `pivots` (or with M = 0) only the update is done. `near` names a segment for each
    replica: the others' products may be left out (their values mean nothing), and
    `project_step` must be given the same.

    Raises:
        ValueError: dtypes other than float32 and float64, shapes, devices or layouts that do not
            fit, tensors that overlap one that is written, or options `torch.optim` refuses too.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> products = sgd_step(theta, torch.ones(2), lr=0.5, pivots=torch.zeros(1, 2))
        >>> theta, products
        (tensor([0.5000, 1.5000]), tensor([[2.5000], [0.0000]], dtype=torch.float64))
    """
    refuse_autograd(theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    buffer = theta.new_empty(0) if momentum_buffer is None else momentum_buffer
    products: Tensor = undispatched(torch.ops.entropic_fast.sgd_step, _sgd, theta)(
        rows, _rows(grad), _rows(buffer), _rates(lr, rows), pivots,
        momentum, dampening, weight_decay, nesterov, first, near,
    )  # fmt: skip
    return products if theta.dim() == 2 else products[0]


def adam_step(
    theta: Tensor,  # [R, P] or [P], updated in place
    grad: Tensor,  # like theta
    exp_avg: Tensor,  # like theta, updated in place
    exp_avg_sq: Tensor,  # like theta, updated in place
    step: Tensor,  # [R] (or one element) int64, steps taken before; counted up in place
    *,
    lr: float | Tensor,  # number or [R] float64
    pivots: Tensor | None = None,  # [M, P]
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    near: Tensor | None = None,  # [R] int64, as for `sgd_step`
) -> Tensor:  # [R, 2, M] or [2, M] float64
    """One step of `torch.optim.Adam`, or of `AdamW` if `decoupled`, in place, and the products.

    The first step expects zeros in `exp_avg`, `exp_avg_sq` and `step`.

    Raises:
        ValueError: as `sgd_step`.

    Example:
        >>> theta, mean, square = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(2)
        >>> step = torch.zeros(1, dtype=torch.int64)
        >>> products = adam_step(theta, torch.tensor([3.0, -4.0]), mean, square, step, lr=0.1)
        >>> theta, step
        (tensor([0.9000, 2.1000]), tensor([1]))
    """
    refuse_autograd(theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    products: Tensor = undispatched(torch.ops.entropic_fast.adam_step, _adam, theta)(
        rows, _rows(grad), _rows(exp_avg), _rows(exp_avg_sq), step.reshape(-1),
        _rates(lr, rows), pivots, betas[0], betas[1], eps, weight_decay, decoupled, near,
    )  # fmt: skip
    return products if theta.dim() == 2 else products[0]


def project_step(
    theta: Tensor,  # [R, P] or [P], updated in place
    products: Tensor,  # [R, 2, M] or [2, M] float64, of this theta
    pivots: Tensor,  # [M, P], M >= 2
    squares: Tensor,  # [M - 1] float64, from segment_squares(pivots)
    near: Tensor | None = None,  # [R] int64, as it was given for the products
    between: Tensor | None = None,  # [M, M] float64, from pivot_squares(pivots); with `near`
) -> tuple[Tensor, Tensor, Tensor]:  # [R] int64, [R] float64, [R] float64; no R for theta [P]
    """Moves each replica to the nearest point of the polyline through the pivots.

    Returns the segment's number, the position t in [0, 1] on it, and the Euclidean distance moved.
    A tie goes to the lowest segment; a segment of length zero is the point it is. Where theta or a
    pivot is not finite, theta, t and the distance become NaN and the segment 0.

    Raises:
        ValueError: fewer than two pivots, and as `sgd_step`.

    Example:
        >>> pivots = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
        >>> theta = torch.tensor([2.5, 1.5])
        >>> products = sgd_step(theta, torch.zeros(2), lr=0.0, pivots=pivots)
        >>> segment, t, distance = project_step(theta, products, pivots, segment_squares(pivots))
        >>> segment.item(), t.item(), distance.item(), theta
        (1, 0.75, 0.5, tensor([2.0000, 1.5000]))
    """
    refuse_autograd(theta)
    single = theta.dim() == 1
    if single and products.dim() == 2:
        products = products[None]
    segment, t, distance = undispatched(torch.ops.entropic_fast.project_step, _project, theta)(
        _rows(theta), products, pivots, squares, near, between
    )
    return (segment[0], t[0], distance[0]) if single else (segment, t, distance)


def segment_squares(
    pivots: Tensor,  # [M, P]
) -> Tensor:  # [M - 1] float64
    """Squared lengths of the polyline's segments, taken in float64; once for each path.

    >>> segment_squares(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([25.], dtype=torch.float64)
    """
    if pivots.dim() != 2 or pivots.shape[0] < 1:
        raise invalid("pivots", "shape [M, P] with M >= 1", f"shape {list(pivots.shape)}")
    squares = [(b.double() - a.double()).square().sum() for a, b in pairwise(pivots)]
    if not squares:
        return torch.zeros(0, dtype=torch.float64, device=pivots.device)
    return torch.stack(squares)


def pivot_squares(
    pivots: Tensor,  # [M, P]
) -> Tensor:  # [M, M] float64
    """Squared distances of the pivots from each other, taken in float64; once for each path.

    >>> pivot_squares(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    segment_squares(pivots[:1])  # the same checks
    count = len(pivots)
    squares = torch.zeros(count, count, dtype=torch.float64, device=pivots.device)
    for i, j in combinations(range(count), 2):
        squares[i, j] = squares[j, i] = (pivots[i].double() - pivots[j].double()).square().sum()
    return squares


# ---- registration with torch ---------------------------------------------------------------------


def _sgd(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    pivots: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    near: Tensor | None = None,
) -> Tensor:
    check_sgd(theta, grad, momentum_buffer, lr, pivots, momentum, dampening, weight_decay, nesterov)
    check_near(theta, pivots, near)
    written = {"theta": theta, "momentum_buffer": momentum_buffer}
    check_overlap(written, {"grad": grad, "lr": lr, "pivots": pivots})
    products: Tensor = implementation(FAMILY, theta.device).sgd_step(
        theta, grad, momentum_buffer, lr, pivots,
        momentum, dampening, weight_decay, nesterov, first, *_if_taken(theta, near),
    )  # fmt: skip
    return products


_sgd_step = torch.library.custom_op(
    "entropic_fast::sgd_step", _sgd, mutates_args=("theta", "momentum_buffer")
)


@_sgd_step.register_fake
def _(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    pivots: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    near: Tensor | None = None,
) -> Tensor:
    check_sgd(theta, grad, momentum_buffer, lr, pivots, momentum, dampening, weight_decay, nesterov)
    return _fake_products(theta, pivots)


def _adam(
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
    decoupled: bool,
    near: Tensor | None = None,
) -> Tensor:
    check_adam(theta, grad, exp_avg, exp_avg_sq, step, lr, pivots, beta1, beta2, eps, weight_decay)
    check_near(theta, pivots, near)
    written = {"theta": theta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    check_overlap(written, {"grad": grad, "lr": lr, "pivots": pivots})
    step += 1
    products: Tensor = implementation(FAMILY, theta.device).adam_step(
        theta, grad, exp_avg, exp_avg_sq, step, lr, pivots,
        beta1, beta2, eps, weight_decay, decoupled, *_if_taken(theta, near),
    )  # fmt: skip
    return products


_adam_step = torch.library.custom_op(
    "entropic_fast::adam_step",
    _adam,
    mutates_args=("theta", "exp_avg", "exp_avg_sq", "step"),
)


@_adam_step.register_fake
def _(
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
    decoupled: bool,
    near: Tensor | None = None,
) -> Tensor:
    check_adam(theta, grad, exp_avg, exp_avg_sq, step, lr, pivots, beta1, beta2, eps, weight_decay)
    return _fake_products(theta, pivots)


def _project(
    theta: Tensor,
    products: Tensor,
    pivots: Tensor,
    segment_squares: Tensor,
    near: Tensor | None = None,
    between: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_project(theta, products, pivots, segment_squares)
    check_near(theta, pivots, near, between, projects=True)
    read = {"products": products, "pivots": pivots, "segment_squares": segment_squares}
    check_overlap({"theta": theta}, read)
    result: tuple[Tensor, Tensor, Tensor] = implementation(FAMILY, theta.device).project_step(
        theta, products, pivots, segment_squares, *_if_taken(theta, near, between)
    )
    return result


_project_step = torch.library.custom_op(
    "entropic_fast::project_step", _project, mutates_args=("theta", "products")
)


@_project_step.register_fake
def _(
    theta: Tensor,
    products: Tensor,
    pivots: Tensor,
    segment_squares: Tensor,
    near: Tensor | None = None,
    between: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_project(theta, products, pivots, segment_squares)
    per_replica = theta.new_empty(theta.shape[0], dtype=torch.float64)
    return (
        torch.empty_like(per_replica, dtype=torch.int64),
        per_replica,
        torch.empty_like(per_replica),
    )


def _fake_products(theta: Tensor, pivots: Tensor) -> Tensor:
    return theta.new_empty((theta.shape[0], 2, pivots.shape[0]), dtype=torch.float64)


# ---- arguments ----------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.dim() == 1 else tensor


def _pivots_or_none(pivots: Tensor | None, theta: Tensor) -> Tensor:
    return theta.new_empty(0, theta.shape[-1]) if pivots is None else pivots


def _rates(lr: float | Tensor, theta: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.reshape(-1)
    return torch.full((theta.shape[0],), lr, dtype=torch.float64, device=theta.device)


def _if_taken(theta: Tensor, near: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
    """Arguments for the one backend that can leave products out."""
    native = near is not None and backend_for(FAMILY, theta.device) == "cpp"
    return (near, *more) if native else ()
