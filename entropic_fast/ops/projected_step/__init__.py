"""Family `projected_step`: the fused projection step of projected SGD, for R replicas at once.

Pass one (`sgd_step`, `adam_step`) advances the parameters exactly as `torch.optim` does and, while
they are in cache, computes the products that projection onto the path's polyline needs. Pass two
(`project_step`) finds each replica's nearest point of the polyline from those products and writes
it into the parameters. Neither synchronizes with a GPU. Without pivots, pass one is a plain
optimizer step.

The products of theta with pivots p_0 ... p_{M-1} are float64 sums of differences in float64:

    products[r, 0, m] = |theta_r - p_m|^2
    products[r, 1, m] = <theta_r - p_m, p_{m+1} - p_m>        (0 for the last pivot)

Results do not depend on the number of threads, and are the same bits in every run on one backend.
docs/numerics.md has the error bounds, and why results with `near` are those of all products.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from torch import Tensor

from entropic_fast._utils.checks import invalid
from entropic_fast.ops._checks import reject_autograd
from entropic_fast.ops._register import Op
from entropic_fast.ops.backend import register_family
from entropic_fast.ops.projected_step import checks
from entropic_fast.ops.projected_step.checks import AdamStep, ProjectStep, SgdStep

FAMILY = "projected_step"
register_family(
    FAMILY,
    cuda=True,
    several=("sgd_step", "adam_step", "project_step"),  # sums come after the update or the move
)


def _count_step(a: AdamStep) -> None:
    checks.check_near(a)
    a.step.add_(1)


_sgd_step = Op(
    FAMILY, "sgd_step", SgdStep, check=checks.check_sgd, prepare=checks.check_near,
    results=checks.new_products, writes=("theta", "momentum_buffer"),
)  # fmt: skip
_adam_step = Op(
    FAMILY, "adam_step", AdamStep, check=checks.check_adam, prepare=_count_step,
    results=checks.new_products, writes=("theta", "exp_avg", "exp_avg_sq", "step"),
)  # fmt: skip
_project_step = Op(
    FAMILY, "project_step", ProjectStep, check=checks.check_project, prepare=checks.check_near,
    results=checks.new_positions, writes=("theta", "products"),
)  # fmt: skip


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
            fit, tensors that overlap one that is written, or options `torch.optim` rejects too.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> products = sgd_step(theta, torch.ones(2), lr=0.5, pivots=torch.zeros(1, 2))
        >>> theta, products
        (tensor([0.5000, 1.5000]), tensor([[2.5000], [0.0000]], dtype=torch.float64))
    """
    reject_autograd(theta=theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    buffer = theta.new_empty(0) if momentum_buffer is None else momentum_buffer
    products = _sgd_step(SgdStep(
        rows, _rows(grad), _rows(buffer), _rates(lr, rows), pivots,
        momentum, dampening, weight_decay, nesterov, first, near,
    ))  # fmt: skip
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
    reject_autograd(theta=theta)
    rows, pivots = _rows(theta), _pivots_or_none(pivots, theta)
    products = _adam_step(AdamStep(
        rows, _rows(grad), _rows(exp_avg), _rows(exp_avg_sq), step.reshape(-1),
        _rates(lr, rows), pivots, betas[0], betas[1], eps, weight_decay, decoupled, near,
    ))  # fmt: skip
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
    reject_autograd(theta=theta)
    single = theta.dim() == 1
    if single and products.dim() == 2:
        products = products[None]
    segment, t, distance = _project_step(
        ProjectStep(_rows(theta), products, pivots, squares, near, between)
    )
    return (segment[0], t[0], distance[0]) if single else (segment, t, distance)


def segment_squares(
    pivots: Tensor,  # [M, P]
) -> Tensor:  # [M - 1] float64
    """Squared lengths of the polyline's segments, computed in float64; once per path.

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
    """Squared distances of the pivots from each other, computed in float64; once per path.

    >>> pivot_squares(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    segment_squares(pivots[:1])  # the same checks
    count = len(pivots)
    squares = torch.zeros(count, count, dtype=torch.float64, device=pivots.device)
    for i, j in combinations(range(count), 2):
        squares[i, j] = squares[j, i] = (pivots[i].double() - pivots[j].double()).square().sum()
    return squares


def _rows(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.dim() == 1 else tensor


def _pivots_or_none(pivots: Tensor | None, theta: Tensor) -> Tensor:
    return theta.new_empty(0, theta.shape[-1]) if pivots is None else pivots


def _rates(lr: float | Tensor, theta: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.reshape(-1)
    return torch.full((theta.shape[0],), lr, dtype=torch.float64, device=theta.device)
