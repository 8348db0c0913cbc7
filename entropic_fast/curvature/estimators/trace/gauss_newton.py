"""The trace of the generalized Gauss-Newton matrix, exactly, through norms of gradients.

With H_L = sum_j lambda_j u_j u_j^T the Hessian of an example's loss in its K outputs, and J the
Jacobian of the outputs in the parameters, tr(J^T H_L J) = sum_j lambda_j |J^T u_j|^2: squared norms
of the gradients of <outputs, u_j>, which `gradient_norms` computes for many examples at once.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ...._torch.memory_budget import resolve_budget, too_small
from ...._torch.torch_compile import clean_dispatch_state
from ...._utils.results import Estimate
from ....objective import Objective, require_objective
from ....objective.data import Batch, ExampleSet, RepeatedExamples
from ....ops.random_bits import streams as random
from ..._grouping import grouping
from ...operators._second_order import GGNOperator, HessianOperator
from ...per_example._norms import gradient_norms
from .._probes import precise
from ._integrands import TraceIntegrand, quadratic_form
from ._output_factors import output_factors
from ._registry import Budget, Probes, TraceEstimates, trace_estimator
from .hutchinson import HutchinsonSampler

# Directions of an example that `quick_ggn_trace` computes one by one, and random sums of all
# others: two draws show their spread.
LEADING, DRAWS = 2, 2
# With fewer examples all directions are computed: two draws per example do not determine the error.
ENOUGH_EXAMPLES = 32
# Negative eigenvalues below this share of the sum are rounding of a convex loss.
ROUNDING = 1e-12
# Float64 matrices [K, K] per example: Hessian, eigenvectors, the solver's copy, directions.
_MATRICES = 4


@overload
def ggn_trace(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None, *,
    memory_budget: int | None = None, group_by: None = None,
) -> Estimate: ...  # fmt: skip


@overload
def ggn_trace(
    obj: Objective, theta: Tensor | None = None, max_examples: int | None = None, *,
    memory_budget: int | None = None, group_by: str,
) -> dict[str, Estimate]: ...  # fmt: skip


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
    class labels it is the trace of the Fisher matrix with labels drawn from the model. It needs as
    many per-example gradients as the Hessian of the loss in the outputs has nonzero eigenvalues:
    C - 1 per example for cross-entropy with C classes, K for K outputs with squared errors.

    Weight decay c of the objective adds c P. The value is exact for the data; the standard error is
    that of a mean over E examples treated as a sample (NaN for one example).

    Args:
        obj, theta, max_examples: as for `score_matrix`.
        memory_budget, group_by: as for `gradient_norms`.

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
    # Half of the budget for the Hessians in the outputs, which stay while gradients are computed.
    piece = _examples_at_once(obj, theta, budget // 2)
    names = list(dict.fromkeys(map(key, obj.parameter_names)))

    def local_traces() -> Tensor:
        by_example = torch.zeros(len(names), count, dtype=torch.float64, device=obj.device)
        for batch in obj.local_batches(count, piece):
            directions, signs = output_factors(obj, theta, batch)
            norms = _norms(obj, theta, batch, directions, budget - budget // 2, group_by)
            part = by_example[:, batch.start : batch.start + batch.size]
            for row, name in zip(part, names, strict=True):
                row += (norms[name] * signs).sum(1) if norms else 0
        return by_example

    by_example = obj.all_reduce(local_traces, f"Gauss-Newton trace by {group_by} of {count}", theta)
    decay = dict.fromkeys(names, 0.0)
    for name, part in obj.split(theta).items():
        decay[key(name)] += obj.weight_decay * part.numel()
    traces = {
        name: Estimate.from_samples(part, decay[name])
        for name, part in zip(names, by_example, strict=True)
    }
    return traces[""] if group_by is None else traces


@trace_estimator("gauss-newton", symmetric=True, hessian_only=True)
def gauss_newton(
    operator: HessianOperator, integrand: TraceIntegrand, budget: Budget, probes: Probes
) -> TraceEstimates:
    """The Gauss-Newton matrix from gradients, the remainder of the Hessian with sign vectors.

    The first from four gradients per example, or from all of `ggn_trace` if the tolerance asks for
    it. The forms of the remainder use the captured graph alone.
    """
    obj, theta, tol = operator.obj, operator.theta, budget.tol
    obj.require_single_examples()
    ggn = quick_ggn_trace(obj, theta, random.fold_in(probes.seed, "gauss-newton"))
    exact = tol is not None and not precise(ggn, tol / 2)  # leave half of the error to the rest
    if exact:
        ggn = ggn_trace(obj, theta)
    remainder = operator - GGNOperator(obj, theta)
    sampler = HutchinsonSampler(operator, quadratic_form(remainder), probes)
    others = sampler.deflated_trace
    sampler.deflated_trace = others + ggn.value
    sampler.deflated_std_error = 0.0 if exact else ggn.std_error
    sampler.sample_until(tol, budget.vectors)
    if tol is not None and sampler.deflated_std_error and not precise(sampler.total(), tol):
        sampler.deflated_trace = others + ggn_trace(obj, theta).value
        sampler.deflated_std_error = 0.0
        sampler.sample_until(tol, budget.vectors)
    return sampler.estimates()


@clean_dispatch_state()
def quick_ggn_trace(obj: Objective, theta: Tensor, seed: int) -> Estimate:
    """The data term's trace from four gradients per example, however many outputs there are.

    The two directions in which an example's loss bends most are used one by one; all others
    together, as u = sum_j s_j sqrt(lambda_j) u_j with random signs s_j, for which the mean of
    |J^T u|^2 is their share of the trace. Two draws of the signs give the standard error. With at
    most four directions, fewer than 32 examples, or a loss that bends downwards, all directions are
    used, and the error is 0. With more than SMALL classes a GPU has other directions than a CPU.
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
        directions, signs = output_factors(obj, theta, batch)
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
        norms = {"": gradient_norms(single, theta, memory_budget=budget)}
    else:
        norms = gradient_norms(single, theta, memory_budget=budget, group_by=group_by)
    return {name: squared.view(n, rank) for name, squared in norms.items()}


def _along(outputs: Tensor, directions: Tensor) -> Tensor:
    """The inner product of each example's outputs [n, ...] with its direction [n, K].  # [n]"""
    return (outputs.reshape(len(outputs), -1) * directions).sum(1)


def _examples_at_once(obj: Objective, theta: Tensor, room: int) -> int:
    """Examples whose Hessians in the outputs fit."""
    with torch.no_grad():
        size = obj.outputs(theta, next(obj.batches(1)).inputs)[0].numel()
    example_bytes = 8 * _MATRICES * size**2
    if room < example_bytes:
        raise too_small(
            2 * example_bytes,
            2 * room,
            f"the Hessian of a loss in {size} outputs",
            "give more memory, or estimate it: operator_trace(GGNOperator(obj, theta)), or "
            "hessian_trace by another method",
        )
    return min(room // example_bytes, obj.examples.batch_size)
