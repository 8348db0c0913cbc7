"""The trace of the generalized Gauss-Newton matrix, exactly, through norms of gradients.

With H_L = sum_j lambda_j u_j u_j^T the Hessian of an example's loss in its K outputs, and J the
Jacobian of the outputs in the parameters, tr(J^T H_L J) = sum_j lambda_j |J^T u_j|^2: squared norms
of the gradients of <outputs, u_j>, which the score engine gives for many examples at once.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ...._torch.full_precision import full_precision
from ...._torch.memory_budget import resolve_budget, too_small
from ...._torch.torch_compile import clean_dispatch_state
from ...._utils import checks, trees
from ...._utils.devices import is_gpu
from ...._utils.results import Estimate
from ....objective import Objective
from ....objective._dataset import Batch, ExampleSet, RepeatedExamples
from ....objective._objective import require_objective
from ....objective._validation import require_finite_outputs, require_twice_differentiable
from ....objective.losses._cross_entropy import CrossEntropy
from ....objective.losses._elementwise import DiagonalLoss
from ....objective.losses._functions import closed_form, widened
from ....ops.random_bits import streams as random
from ...operators._autograd_check import require_right_loss
from ...per_example._norms import gradient_norms
from ...per_example._scores import grouping
from .._probes import mean_estimate

# Directions of an example that `quick_ggn_trace` takes by themselves. Twice it takes all others
# together: two draws tell how far apart they are.
LEADING, DRAWS = 2, 2
# Of fewer examples all directions are taken: two draws an example are too few to tell the error.
ENOUGH_EXAMPLES = 32
# Share of all eigenvalues under which negative ones are those of a loss that bends upwards.
ROUNDING = 1e-12
# Classes up to which a GPU computes eigenvectors of all examples at once, by Jacobi's method. With
# more, a factor in closed form has one direction per class, one more than there are eigenvalues.
SMALL = 32
# Matrices [K, K] of float64 an example: Hessian, eigenvectors, the solver's own, directions.
_MATRICES = 4


@overload
def ggn_trace(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    *,
    memory_budget: int | None = None,
    group_by: None = None,
) -> Estimate: ...


@overload
def ggn_trace(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str,
) -> dict[str, Estimate]: ...


@clean_dispatch_state()
def ggn_trace(
    obj: Objective,
    theta: Tensor | None = None,
    max_examples: int | None = None,
    *,
    memory_budget: int | None = None,
    group_by: str | None = None,
) -> Estimate | dict[str, Estimate]:
    """Trace of the generalized Gauss-Newton matrix of the mean loss, without probes.

    For any loss that is twice differentiable in the outputs, convex or not; for cross-entropy with
    class labels it is the trace of the Fisher matrix with labels drawn from the model. It takes as
    many per-example gradients as the Hessian of the loss in the outputs has eigenvalues other than
    zero: C - 1 an example for cross-entropy with C classes, K for K outputs with squared errors.

    Weight decay c of the objective adds c P. The value is exact for the data; the standard error is
    that of a mean over E examples taken as a sample (NaN for one example).

    Args:
        obj: an objective whose examples do not influence one another.
        theta: the point; None for the model's own.  # [P]
        max_examples: E, the first so many examples; None for all N.
        memory_budget: bytes to stay under; None for a quarter of the free memory, half on a GPU.
        group_by: None for the whole; "parameter" or "module" for the share of each, by name.

    Raises:
        ValueError: as `gradient_norms`; outputs, or second derivatives of the loss in them, that
            are NaN or infinite; a budget under what one example needs.
        NonFiniteLossError: a loss that is NaN or infinite.

    >>> import torch
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> obj = Objective(torch.nn.Linear(1, 1, bias=False), "mse", (x, 3 * x))
    >>> round(ggn_trace(obj).value, 5)  # the mean of 2 x^2
    5.0
    """
    require_objective(obj)
    obj.require_single_examples()
    obj.require_outputs("the Gauss-Newton matrix")
    count, theta, key = obj.count(max_examples), obj.point(theta), grouping(group_by)
    budget = resolve_budget(memory_budget, obj.device)
    # Half of the budget for the Hessians in the outputs, which stay while gradients are taken.
    piece = _examples_at_once(obj, theta, budget // 2)
    names = list(dict.fromkeys(map(key, obj.parameter_names)))

    def own() -> Tensor:
        found = torch.zeros(len(names), count, dtype=torch.float64, device=obj.device)
        for batch in obj.local_batches(count, piece):
            directions, signs = _factors(obj, theta, batch)
            norms = _norms(obj, theta, batch, directions, budget - budget // 2, group_by)
            part = found[:, batch.start : batch.start + batch.size]
            for row, name in zip(part, names, strict=True):
                row += (norms[name] * signs).sum(1) if norms else 0
        return found

    found = obj.all_reduce(own, f"Gauss-Newton trace by {group_by} of {count}", theta)
    decay = dict.fromkeys(names, 0.0)
    for name, part in obj.split(theta).items():
        decay[key(name)] += obj.weight_decay * part.numel()
    traces = {
        name: mean_estimate(part, decay[name]) for name, part in zip(names, found, strict=True)
    }
    return traces[""] if group_by is None else traces


@clean_dispatch_state()
def quick_ggn_trace(obj: Objective, theta: Tensor, seed: int) -> Estimate:
    """The data term's trace from four gradients an example, however many outputs there are.

    The two directions of an example in which its loss bends most are taken by themselves; all
    others together, u = sum_j s_j sqrt(lambda_j) u_j with random signs s_j, for which the mean of
    |J^T u|^2 is what they add to the trace. Two draws of the signs tell the standard error, which
    is that of the value for these data. Where there are no more than four directions, fewer than
    32 examples, or a loss bends downwards, all are taken by themselves, and the error is 0. On a
    GPU with more than SMALL classes the directions are those of `_class_factors`, so the draws are
    others than a CPU's.
    """
    budget = resolve_budget(None, obj.device)
    enough = obj.num_examples >= ENOUGH_EXAMPLES
    piece = _examples_at_once(obj, theta, budget // 2)
    # The trace and its variance, summed over examples.
    sums = obj.all_reduce(
        lambda: _quick_sums(obj, theta, piece, enough, budget, seed),
        f"Gauss-Newton trace, seed {seed}",
        theta,
    )
    total, variance = sums.tolist()
    count = obj.num_examples
    return Estimate(total / count, variance**0.5 / count, count)


def _quick_sums(
    obj: Objective, theta: Tensor, piece: int, enough: bool, budget: int, seed: int
) -> Tensor:
    total = variance = 0.0
    for batch in obj.local_batches(batch_size=piece):
        directions, signs = _factors(obj, theta, batch)
        rest, sizes = directions[:, LEADING:], directions.square().sum(2)
        down = float((sizes * (signs < 0)).sum())
        drawn = enough and rest.shape[1] > DRAWS and down <= ROUNDING * float(sizes.sum())
        if drawn:
            rest = rest * (signs[:, LEADING:, None] > 0)
            sums = [(s * rest).sum(1, keepdim=True) for s in _signs(batch, rest, seed)]
            directions = torch.cat([directions[:, :LEADING], *sums], 1)
        norms = _norms(obj, theta, batch, directions, budget - budget // 2, None)
        if not norms:
            continue
        if not drawn:
            total += float((norms[""] * signs).sum())
            continue
        leading, draws = norms[""][:, :LEADING], norms[""][:, LEADING:]
        total += float(leading.sum() + draws.mean(1).sum())
        variance += float((draws[:, 0] - draws[:, 1]).square().sum()) / 4
    return torch.tensor([total, variance], dtype=torch.float64, device=obj.device)


def _signs(batch: Batch, rest: Tensor, seed: int) -> list[Tensor]:
    """Signs for each draw, by example: the same however examples are batched.  # [n, r, 1]"""
    n, _, size = rest.shape
    words = (
        random.words(n * size, seed, d, start=batch.start * size, device=rest.device)
        for d in range(DRAWS)
    )
    bits = [(w >> 31).view(n, size, 1)[:, : rest.shape[1]] for w in words]
    return [(2 * b - 1).to(rest) for b in bits]


def _norms(
    obj: Objective,
    theta: Tensor,
    batch: Batch,
    directions: Tensor,
    budget: int,
    group_by: str | None,
) -> dict[str, Tensor]:
    """|J^T u|^2 for the directions u [n, r, K] of a batch, by name; none if r is 0.  # [n, r]"""
    n, rank, _ = directions.shape
    if not rank:
        return {}
    inputs = ExampleSet.of(batch.inputs, directions[:, :, 0], obj.examples, None)
    repeated = RepeatedExamples(inputs, rank, directions.flatten(0, 1))
    single = obj.without_distribution()._replace(repeated, _along, theta)
    if group_by is None:
        found = {"": gradient_norms(single, theta, memory_budget=budget)}
    else:
        found = gradient_norms(single, theta, memory_budget=budget, group_by=group_by)
    return {name: squared.view(n, rank) for name, squared in found.items()}


def _along(outputs: Tensor, directions: Tensor) -> Tensor:
    """The inner product of each example's outputs [n, ...] with its direction [n, K].  # [n]"""
    return (outputs.reshape(len(outputs), -1) * directions).sum(1)


@full_precision()
def _factors(obj: Objective, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
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
    if by_class is not None and outputs.ndim == 2 and not _has_class_factors(outputs):
        by_class = None
    diagonal = closed if isinstance(closed, DiagonalLoss) else None
    known = by_class or diagonal
    if known is not None and not checks.all_finite(obj.output_losses(free, targets)):
        obj.finite_losses(theta, batch)  # raises, naming the example
    if diagonal is not None:
        directions, signs = _output_factors(diagonal.curvatures(free, targets))
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

    The Hessian has a block diag p - p p^T for each position: its eigenvectors are found by
    themselves, in C^3 operations per position.
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


def _has_class_factors(outputs: Tensor) -> bool:
    """Whether a GPU is spared the eigenvectors of every example, for more than SMALL classes."""
    return outputs.shape[1] > SMALL and is_gpu(outputs.device)


def _output_factors(curvatures: Tensor) -> tuple[Tensor, Tensor]:
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
    of the cross-entropy whatever the label, but for the target's weight.
    """
    p = outputs.softmax(1)
    # 1 - p_k, for the most probable class as a sum: at a confident example it is all rounding.
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
    found = torch.zeros(n, size, size, dtype=torch.float64, device=obj.device)
    free = outputs.detach().requires_grad_()
    losses = obj.output_losses(free, targets)
    if not bool(torch.isfinite(losses.detach()).all()):
        obj.finite_losses(theta, batch)  # raises, naming the example
    if not losses.requires_grad:  # a loss that is constant in the outputs
        return found
    require_twice_differentiable(losses)
    (gradient,) = torch.autograd.grad(losses.sum(), free, create_graph=True)
    if not gradient.requires_grad:  # a loss linear in the outputs
        return found
    columns = gradient.reshape(n, -1)
    for k in range(size):
        (column,) = torch.autograd.grad(
            columns[:, k].sum(), free, retain_graph=k + 1 < size, materialize_grads=True
        )
        found[:, k] = column.reshape(n, -1)
    if not bool(torch.isfinite(found).all()):
        bad = ~torch.isfinite(found).flatten(1).all(1)
        raise ValueError(
            "loss: expected finite second derivatives in the outputs, got NaN or infinity for "
            f"example {batch.start + int(bad.nonzero()[0])}; the loss has none there"
        )
    return (found + found.transpose(1, 2)) / 2


def _examples_at_once(obj: Objective, theta: Tensor, room: int) -> int:
    """Examples whose Hessians in the outputs fit."""
    with torch.no_grad():
        size = obj.outputs(theta, next(obj.batches(1)).inputs)[0].numel()
    each = 8 * _MATRICES * size**2
    if room < each:
        raise too_small(
            2 * each,
            2 * room,
            f"the Hessian of a loss in {size} outputs",
            "give more memory, or estimate it: operator_trace(GGNOperator(obj, theta)), or "
            "hessian_trace by another method",
        )
    return min(room // each, obj.examples.batch_size)
