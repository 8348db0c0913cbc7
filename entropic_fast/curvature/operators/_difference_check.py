"""Products by differences of first derivatives, to compare the graph with.

Autograd's second derivatives of attention keep every matrix of scores, T x T for T tokens; its
first derivatives keep none. Differences are taken in float64, except for models so large that a
float64 copy is much to ask for.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ..._torch.graph_checks import require_finite_losses
from ...objective import Objective
from ...objective.data import Batch, ExampleSet
from ..hvp import OutputLoss
from ..hvp._interpreter import GraphInterpreter

# Bytes of attention scores of a sample from which on differences are tried first.
MANY_SCORES = 2**26
# Parameters from which on differences are tried first, in the objective's dtype.
MANY_PARAMETERS = 2**24
# Of points, in units of theta's root mean square. GPT-2 small in float32: products differ from
# autograd's by 5e-4, 1.4e-4 and 1.3e-2 of their norm at spacings of 1e-4, 1e-3 and 1e-2.
SPACING = {torch.float64: 1e-5, torch.float32: 1e-3}


def are_worthwhile(obj: Objective, graph: GraphInterpreter) -> bool:
    """Whether differences cost much less memory or time than autograd's second derivatives."""
    if _is_large(obj):  # and float32 differences would cross kinks
        return obj.dtype in SPACING and not graph.has_kinks
    return graph.score_bytes > MANY_SCORES


def _is_large(obj: Objective) -> bool:
    return obj.num_params > MANY_PARAMETERS


@full_precision()
def hessian_product(obj: Objective, theta: Tensor, batch: Batch, v: Tensor) -> Tensor:
    """The Hessian of a batch's summed loss times v [P].  # [P]"""
    obj = _precise(obj, batch)
    theta, v = theta.detach().to(obj.dtype), v.to(obj.dtype)
    step, product = _step(theta), torch.zeros_like(theta)
    for sign in (1, -1):
        _add_gradient(obj, torch.add(theta, v, alpha=sign * step), sign, product)
    return product.div_(2 * step)


def _add_gradient(obj: Objective, theta: Tensor, factor: float, total: Tensor) -> None:
    """Add `factor` times the gradient of the summed loss to total [P]."""
    leaves = {name: part.requires_grad_() for name, part in obj.split(theta).items()}
    for leaf, part in zip(leaves.values(), obj.split(total).values(), strict=True):
        leaf.grad = part  # backward passes add to it, and hold no gradient of all parameters
    with torch.enable_grad():
        for batch in obj.batches():
            losses = obj.losses_with(leaves, batch.inputs, batch.targets)
            require_finite_losses(losses.detach(), theta, *batch)
            torch.autograd.backward(factor * losses.sum(), inputs=list(leaves.values()))


@full_precision()
def ggn_product(obj: Objective, theta: Tensor, batch: Batch, v: Tensor) -> Tensor:
    """The Gauss-Newton matrix of a batch's summed loss times v [P].  # [P]"""
    obj = _precise(obj, batch)
    leaf, v = theta.detach().to(obj.dtype).requires_grad_(), v.to(obj.dtype)
    h, total = _step(leaf), torch.zeros_like(leaf)
    for few in obj.batches():
        with torch.no_grad():
            ahead, behind = (
                obj.outputs(torch.add(leaf, v, alpha=step), few.inputs) for step in (h, -h)
            )
            moved = (ahead - behind) / (2 * h)
        with torch.enable_grad():
            outputs = obj.outputs(leaf, few.inputs)
        weights = torch.ones(few.size, dtype=outputs.dtype, device=outputs.device)
        loss = OutputLoss(obj, outputs.detach(), few.targets, weights)
        total += torch.autograd.grad(outputs, leaf, loss.hessian(moved[None])[0])[0]
    return total


def _step(theta: Tensor) -> float:
    return max(1e-2, float(theta.detach().square().mean().sqrt())) * SPACING[theta.dtype]


def _precise(obj: Objective, batch: Batch) -> Objective:
    """The objective on a batch alone, in float64 unless it is large."""
    few = on_batch(obj, batch)
    return few if _is_large(obj) else few.double()


def on_batch(obj: Objective, batch: Batch) -> Objective:
    """The objective on a batch alone, in this process."""
    few = copy.copy(obj.without_distribution())
    few.examples = ExampleSet.of(batch.inputs, batch.targets, obj.examples, None)
    if obj.examples.with_targets:
        few.examples = few.examples.including_targets()
    return few
