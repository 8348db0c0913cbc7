"""Factors of the Hessian of each example's loss in its outputs: directions and signs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._torch.full_precision import full_precision
from ...._torch.graph_checks import require_finite_outputs, require_twice_differentiable
from ...._utils import checks, trees
from ...._utils.devices import is_gpu
from ....objective import Objective
from ....objective.data import Batch
from ....objective.losses import CrossEntropy, DiagonalLoss, closed_form, widened
from ...operators._autograd_check import require_right_loss

# Classes up to which a GPU computes eigenvectors of all examples at once, by Jacobi's method. With
# more, a factor in closed form has one direction per class, one more than there are eigenvalues.
SMALL = 32


@full_precision()
def output_factors(obj: Objective, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Directions u_j sqrt|lambda_j| [n, r, K], and the signs of lambda_j [n, r].

    r is the largest rank in the batch; an example of lower rank has directions of zeros.
    """
    with torch.no_grad():
        outputs = obj.outputs(theta, batch.inputs)
    require_finite_outputs(outputs, batch.start)
    dtype, free, targets = widened(outputs).dtype, widened(outputs), batch.targets
    closed = closed_form(obj.loss_fn)
    if closed is not None:
        # In float32, the second derivative of a confident example's cross-entropy is all rounding.
        free = free.double()
        targets = trees.mapped(lambda t: t.double() if t.is_floating_point() else t, targets)
    by_class = closed if isinstance(closed, CrossEntropy) and closed.by_class else None
    if outputs.ndim == 2 and (outputs.shape[1] <= SMALL or not is_gpu(outputs.device)):
        by_class = None
    diagonal = closed if isinstance(closed, DiagonalLoss) else None
    factored = by_class or diagonal
    if factored is not None and not checks.all_finite(obj.output_losses(free, targets)):
        obj.finite_losses(theta, batch)  # raises, naming the example
    if diagonal is not None:
        directions, signs = _diagonal_factors(diagonal.curvatures(free, targets))
        return directions.to(dtype), signs
    if by_class is not None and outputs.ndim > 2:
        directions, signs = _position_factors(by_class, free, targets)
        return directions.to(dtype), signs
    if by_class is not None:
        mass = by_class.target_mass(free, targets).expand(len(free), 1) * by_class.scale(1)
        directions = _class_factors(free) * mass.abs().sqrt()[:, :, None]
        return directions.to(dtype), mass.sign().expand(directions.shape[:2])
    values, vectors = torch.linalg.eigh(_output_hessians(obj, theta, batch, free, targets))
    values, order = _largest(values, torch.finfo(free.dtype).eps)
    vectors = vectors.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, len(vectors[0])))
    directions = vectors * values.abs().sqrt()[:, :, None]
    return directions.to(dtype), values.sign()


def _largest(values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n, K] other than zero, the largest first, and their places.  # [n, r] each"""
    sizes = values.abs()
    # Eigenvalues that are zero come out as rounding of the largest, in the dtype of the loss.
    values = values * (sizes > values.shape[1] * eps * sizes.amax(1, keepdim=True))
    rank = int((values != 0).sum(1).max())
    order = values.abs().argsort(1, descending=True)[:, :rank]
    return values.gather(1, order), order


def _position_factors(
    loss: CrossEntropy, outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Directions [n, r, K] and signs [n, r] for a cross-entropy at many positions.

    The Hessian has one block diag p - p p^T per position, each diagonalized by itself.
    """
    axis = loss.class_axis
    scores = outputs.movedim(axis, -1)  # [n, ..., C]
    positions = scores.shape[1:-1]
    p = scores.flatten(1, -2).softmax(2)  # [n, S, C]
    n, count, classes = p.shape
    mass = loss.target_mass(outputs, targets) * loss.scale(count)
    mass = mass.movedim(axis, -1) if mass.ndim else mass.expand(n, *positions, 1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[..., None] * p[:, :, None])
    values = (values * mass.reshape(n, count, 1)).flatten(1)
    values, order = _largest(values, torch.finfo(outputs.dtype).eps)
    columns = vectors.transpose(2, 3).flatten(1, 2)  # [n, S C, C]
    columns = columns.gather(1, order[:, :, None].expand(-1, -1, classes))
    columns = columns * values.abs().sqrt()[:, :, None]
    directions = columns.new_zeros(n, order.shape[1], count, classes)
    place = (order // classes)[:, :, None, None].expand(-1, -1, 1, classes)
    directions.scatter_(2, place, columns[:, :, None])
    directions = directions.view(n, -1, *positions, classes).movedim(-1, axis + 1)
    return directions.flatten(2), values.sign()


def _diagonal_factors(curvatures: Tensor) -> tuple[Tensor, Tensor]:
    """Directions sqrt|h_k| e_k, the longest first, for a diagonal Hessian.  # [n, K, K], [n, K]"""
    flat = curvatures.reshape(len(curvatures), -1)
    order = flat.abs().argsort(1, descending=True)
    values = flat.gather(1, order)
    directions = flat.new_zeros(*flat.shape, flat.shape[1])
    directions.scatter_(2, order[:, :, None], values.abs().sqrt()[:, :, None])
    return directions, values.sign()


def _class_factors(outputs: Tensor) -> Tensor:
    """Directions sqrt(p_k) (e_k - p), the longest first, for class scores [n, K].  # [n, K, K]

    They are the columns of B = diag(sqrt p) - p sqrt(p)^T, and B B^T = diag p - p p^T, the Hessian
    of the cross-entropy for any label, up to the target's weight.
    """
    p = outputs.softmax(1)
    # 1 - p_k; for the most probable class as a sum, as the difference is rounding if it is certain.
    top = p.argmax(1, keepdim=True)
    left = (1 - p).scatter_(1, top, p.scatter(1, top, 0.0).sum(1, keepdim=True))
    directions = (-p[:, None]).repeat(1, p.shape[1], 1)
    directions.diagonal(dim1=1, dim2=2).copy_(left)
    directions *= p.sqrt()[:, :, None]
    order = directions.square().sum(2).argsort(1, descending=True)
    return directions.gather(1, order[:, :, None].expand_as(directions))


def _output_hessians(
    obj: Objective, theta: Tensor, batch: Batch, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Second derivatives of each example's loss in its outputs, in float64.  # [n, K, K]"""
    require_right_loss(obj, theta, "ggn_trace")
    n = len(outputs)
    size = outputs[0].numel()
    hessians = torch.zeros(n, size, size, dtype=torch.float64, device=obj.device)
    free = outputs.detach().requires_grad_()
    losses = obj.output_losses(free, targets)
    if not bool(torch.isfinite(losses.detach()).all()):
        obj.finite_losses(theta, batch)  # raises, naming the example
    if not losses.requires_grad:  # a loss that is constant in the outputs
        return hessians
    require_twice_differentiable(losses)
    (gradient,) = torch.autograd.grad(losses.sum(), free, create_graph=True)
    if not gradient.requires_grad:  # a loss linear in the outputs
        return hessians
    columns = gradient.reshape(n, -1)
    for k in range(size):
        (column,) = torch.autograd.grad(
            columns[:, k].sum(), free, retain_graph=k + 1 < size, materialize_grads=True
        )
        hessians[:, k] = column.reshape(n, -1)
    if not bool(torch.isfinite(hessians).all()):
        bad = ~torch.isfinite(hessians).flatten(1).all(1)
        raise ValueError(
            "loss: expected finite second derivatives in the outputs, got NaN or infinity for "
            f"example {batch.start + int(bad.nonzero()[0])}; the loss has none there"
        )
    return (hessians + hessians.transpose(1, 2)) / 2
