"""Family `step`: the fused projection step of projected SGD, for R replicas at once.

Pass one (`sgd_step`, `adam_step`) advances the parameters exactly as `torch.optim` does and, while
they are in cache, takes the products that projection onto the path's polyline needs. Pass two
(`project_step`) finds each replica's nearest point of the polyline from those products and writes
it into the parameters. Neither synchronises with a GPU. Between projections pass no pivots: then
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
"""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from torch import Tensor

from entropic_fast.checks import fail
from entropic_fast.ops.backend import implementation, register_family

FAMILY = "step"
DTYPES = (torch.float32, torch.float64)

register_family(
    FAMILY,
    {
        "reference": "entropic_fast.reference.step",
        "cpp": "entropic_fast.ops.step_native",
        "cuda": "entropic_fast.ops.step_native",
        "triton": "entropic_fast.triton.step",
    },
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
) -> Tensor:  # [R, 2, M] or [2, M] float64
    """One step of `torch.optim.SGD` in place, and the products that projection needs.

    `first` says that no step was taken before: the momentum buffer is then filled, not read.
    Without `pivots` (or with M = 0) only the update is done.

    Raises:
        ValueError: dtypes other than float32 and float64, shapes, devices or layouts that do not
            fit, tensors that overlap one that is written, or options `torch.optim` refuses too.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> products = sgd_step(theta, torch.ones(2), lr=0.5, pivots=torch.zeros(1, 2))
        >>> theta, products
        (tensor([0.5000, 1.5000]), tensor([[2.5000], [0.0000]], dtype=torch.float64))
    """
    _refuse_autograd(theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    buffer = theta.new_empty(0) if momentum_buffer is None else momentum_buffer
    products: Tensor = torch.ops.entropic_fast.sgd_step(
        rows, _rows(grad), _rows(buffer), _rates(lr, rows), pivots,
        momentum, dampening, weight_decay, nesterov, first,
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
    _refuse_autograd(theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    products: Tensor = torch.ops.entropic_fast.adam_step(
        rows, _rows(grad), _rows(exp_avg), _rows(exp_avg_sq), step.reshape(-1),
        _rates(lr, rows), pivots, betas[0], betas[1], eps, weight_decay, decoupled,
    )  # fmt: skip
    return products if theta.dim() == 2 else products[0]


def project_step(
    theta: Tensor,  # [R, P] or [P], updated in place
    products: Tensor,  # [R, 2, M] or [2, M] float64, of this theta
    pivots: Tensor,  # [M, P], M >= 2
    squares: Tensor,  # [M - 1] float64, from segment_squares(pivots)
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
    _refuse_autograd(theta)
    single = theta.dim() == 1
    if single and products.dim() == 2:
        products = products[None]
    segment, t, distance = torch.ops.entropic_fast.project_step(
        _rows(theta), products, pivots, squares
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
        raise fail("pivots", "shape [M, P] with M >= 1", f"shape {list(pivots.shape)}")
    squares = [(b.double() - a.double()).square().sum() for a, b in pairwise(pivots)]
    if not squares:
        return torch.zeros(0, dtype=torch.float64, device=pivots.device)
    return torch.stack(squares)


# ---- registration with torch ---------------------------------------------------------------------


@torch.library.custom_op("entropic_fast::sgd_step", mutates_args=("theta", "momentum_buffer"))
def _sgd_step(
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
) -> Tensor:
    _check_sgd(
        theta, grad, momentum_buffer, lr, pivots, momentum, dampening, weight_decay, nesterov
    )
    written = {"theta": theta, "momentum_buffer": momentum_buffer}
    _check_overlap(written, {"grad": grad, "lr": lr, "pivots": pivots})
    products: Tensor = implementation(FAMILY, theta.device).sgd_step(
        theta, grad, momentum_buffer, lr, pivots,
        momentum, dampening, weight_decay, nesterov, first,
    )  # fmt: skip
    return products


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
) -> Tensor:
    _check_sgd(
        theta, grad, momentum_buffer, lr, pivots, momentum, dampening, weight_decay, nesterov
    )
    return _fake_products(theta, pivots)


@torch.library.custom_op(
    "entropic_fast::adam_step", mutates_args=("theta", "exp_avg", "exp_avg_sq", "step")
)
def _adam_step(
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
) -> Tensor:
    _check_adam(theta, grad, exp_avg, exp_avg_sq, step, lr, pivots, beta1, beta2, eps, weight_decay)
    written = {"theta": theta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    _check_overlap(written, {"grad": grad, "lr": lr, "pivots": pivots})
    step += 1
    products: Tensor = implementation(FAMILY, theta.device).adam_step(
        theta, grad, exp_avg, exp_avg_sq, step, lr, pivots,
        beta1, beta2, eps, weight_decay, decoupled,
    )  # fmt: skip
    return products


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
) -> Tensor:
    _check_adam(theta, grad, exp_avg, exp_avg_sq, step, lr, pivots, beta1, beta2, eps, weight_decay)
    return _fake_products(theta, pivots)


@torch.library.custom_op("entropic_fast::project_step", mutates_args=("theta",))
def _project_step(
    theta: Tensor, products: Tensor, pivots: Tensor, segment_squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_project(theta, products, pivots, segment_squares)
    read = {"products": products, "pivots": pivots, "segment_squares": segment_squares}
    _check_overlap({"theta": theta}, read)
    result: tuple[Tensor, Tensor, Tensor] = implementation(FAMILY, theta.device).project_step(
        theta, products, pivots, segment_squares
    )
    return result


@_project_step.register_fake
def _(
    theta: Tensor, products: Tensor, pivots: Tensor, segment_squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_project(theta, products, pivots, segment_squares)
    per_replica = theta.new_empty(theta.shape[0], dtype=torch.float64)
    return (
        torch.empty_like(per_replica, dtype=torch.int64),
        per_replica,
        torch.empty_like(per_replica),
    )


def _fake_products(theta: Tensor, pivots: Tensor) -> Tensor:
    return theta.new_empty((theta.shape[0], 2, pivots.shape[0]), dtype=torch.float64)


# ---- checks --------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.dim() == 1 else tensor


def _pivots_or_none(pivots: Tensor | None, theta: Tensor) -> Tensor:
    return theta.new_empty(0, theta.shape[-1]) if pivots is None else pivots


def _rates(lr: float | Tensor, theta: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.reshape(-1)
    return torch.full((theta.shape[0],), lr, dtype=torch.float64, device=theta.device)


def _refuse_autograd(theta: Tensor) -> None:
    if theta.requires_grad and torch.is_grad_enabled():
        raise fail(
            "theta",
            "a tensor that autograd does not follow",
            "one with requires_grad=True",
            "call under torch.no_grad() or pass theta.detach()",
        )


def _check_theta(theta: Tensor) -> None:
    if theta.dim() != 2:
        raise fail("theta", "shape [R, P] or [P]", f"shape {list(theta.shape)}")
    if theta.dtype not in DTYPES:
        raise fail("theta", "dtype float32 or float64", str(theta.dtype), "convert it first")


def _check_fits(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise fail(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise fail(name, f"dtype {dtype}", str(tensor.dtype), f"pass {name}.to({dtype})")
    if tensor.device != theta.device:
        raise fail(name, f"device {theta.device} as theta", str(tensor.device), "move it there")
    if not tensor.is_contiguous():
        raise fail(
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
        raise fail("pivots", f"shape [M, {size}]", f"shape {list(pivots.shape)}")
    _check_fits("pivots", pivots, theta, theta.dtype, pivots.shape[0], size)


def _check_at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise fail(name, "a finite number of at least 0", repr(value))


def _check_sgd(
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
        raise fail("dampening", "a finite number", repr(dampening))
    if nesterov and (momentum <= 0 or dampening != 0):
        raise fail(
            "nesterov",
            "momentum > 0 and dampening 0",
            f"momentum {momentum} and dampening {dampening}",
        )


def _check_adam(
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
            raise fail(name, "a number in [0, 1)", repr(beta))


def _check_project(
    theta: Tensor, products: Tensor, pivots: Tensor, segment_squares: Tensor
) -> None:
    _check_theta(theta)
    replicas, size = theta.shape
    _check_fits("theta", theta, theta, theta.dtype, replicas, size)
    if pivots.dim() != 2 or pivots.shape[0] < 2:
        raise fail(
            "pivots",
            f"shape [M, {size}] with M >= 2",
            f"shape {list(pivots.shape)}",
            "a path has at least one segment",
        )
    count = pivots.shape[0]
    _check_fits("pivots", pivots, theta, theta.dtype, count, size)
    _check_fits("products", products, theta, torch.float64, replicas, 2, count)
    _check_fits("segment_squares", segment_squares, theta, torch.float64, count - 1)


def _check_overlap(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Contiguous tensors share memory exactly when their address ranges meet."""
    spans = [
        (name, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name in written)
        for name, t in {**written, **read}.items()
        if t.numel() > 0
    ]
    for (a, a_start, a_end, a_written), (b, b_start, b_end, b_written) in combinations(spans, 2):
        if (a_written or b_written) and a_start < b_end and b_start < a_end:
            raise fail(a, f"memory of its own, apart from {b}", "tensors that overlap", "clone one")
