"""Products by differences of first derivatives, to compare the graph with where scores are many.

Autograd's second derivatives of attention keep every matrix of scores, T x T for T tokens; its
first derivatives keep none. Differences are taken in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..._torch.full_precision import full_precision
from ...objective import Objective
from ...objective.data import Batch, ExampleSet
from ..hvp import OutputLoss

# Bytes of attention scores of a sample from which on differences are tried first.
MANY_SCORES = 2**26
# Most bytes of float64 vectors [P], of which differences hold about ten.
VECTORS = 2 * 2**30
SPACING = 1e-5  # of points, in units of theta's root mean square


def are_worthwhile(obj: Objective, score_bytes: int) -> bool:
    """Whether autograd's second derivatives would hold much more memory than its first."""
    return score_bytes > MANY_SCORES and 8 * 10 * obj.num_params <= VECTORS


@full_precision()
def hessian_product(obj: Objective, theta: Tensor, batch: Batch, v: Tensor) -> Tensor:
    """The Hessian of a batch's summed loss times v [P], in float64 [P]."""
    obj = on_batch(obj, batch).double()

    def gradient(point: Tensor) -> Tensor:
        leaf = point.requires_grad_()
        total = torch.zeros_like(point)
        with torch.enable_grad():
            for few in obj.batches():
                total += torch.autograd.grad(obj.finite_losses(leaf, few).sum(), leaf)[0]
        return total

    return _difference(gradient, theta, v)


@full_precision()
def ggn_product(obj: Objective, theta: Tensor, batch: Batch, v: Tensor) -> Tensor:
    """The Gauss-Newton matrix of a batch's summed loss times v [P], in float64 [P]."""
    obj, leaf = on_batch(obj, batch).double(), theta.detach().double().requires_grad_()
    total = torch.zeros_like(leaf)
    for few in obj.batches():
        with torch.no_grad():
            moved = _difference(partial(_outputs, obj, few), theta, v)
        with torch.enable_grad():
            outputs = obj.outputs(leaf, few.inputs)
        weights = torch.ones(few.size, dtype=outputs.dtype, device=outputs.device)
        loss = OutputLoss(obj, outputs.detach(), few.targets, weights)
        total += torch.autograd.grad(outputs, leaf, loss.hessian(moved[None])[0])[0]
    return total


def _outputs(obj: Objective, batch: Batch, point: Tensor) -> Tensor:
    return obj.outputs(point, batch.inputs)


def on_batch(obj: Objective, batch: Batch) -> Objective:
    """The objective on a batch alone, in this process."""
    few = copy.copy(obj.without_distribution())
    few.examples = ExampleSet.of(batch.inputs, batch.targets, obj.examples, None)
    if obj.examples.with_targets:
        few.examples = few.examples.including_targets()
    return few


def _difference(function: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor) -> Tensor:
    theta, v = theta.detach().double(), v.double()
    step = SPACING * max(1e-2, float(theta.square().mean().sqrt()))
    return (function(theta + step * v) - function(theta - step * v)).detach() / (2 * step)
