"""First and second derivatives of a loss in the outputs of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.graph_checks import require_twice_differentiable
from ...objective import Objective
from ...objective.losses import output_hessian


class OutputLoss:
    """The weighted sum of a batch's losses, as a function of the outputs.

    Second derivatives are in closed form for the losses that have a name, and those of autograd
    otherwise.

    Args:
        obj: whose loss it is.
        outputs: [n, ...]
        targets: [n, ...]
        weights: of the examples.  # [n]
    """

    def __init__(self, obj: Objective, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        self._closed_form = output_hessian(obj.loss_fn, outputs, targets, weights)
        with torch.enable_grad():
            self._at = outputs.detach().requires_grad_()
            losses = obj.output_losses(self._at, targets)
            total = (losses * weights).sum()
            self.losses = losses.detach()
            self._gradient: Tensor | None = None
            if total.requires_grad:
                further = self._closed_form is None
                if further:
                    require_twice_differentiable(total)
                (self._gradient,) = torch.autograd.grad(total, self._at, create_graph=further)

    @property
    def launches_alone(self) -> bool:
        """Whether products of the Hessian are operations that a CUDA graph can hold."""
        return self._closed_form is not None

    @property
    def gradient(self) -> Tensor:
        """In the outputs.  # [n, ...]"""
        return torch.zeros_like(self._at) if self._gradient is None else self._gradient.detach()

    def hessian(self, directions: Tensor) -> Tensor:  # [K, n, ...]
        """Products of the Hessian in the outputs.  # [K, n, ...]"""
        if self._closed_form is not None:
            return self._closed_form(directions)
        if (
            self._gradient is None or not self._gradient.requires_grad
        ):  # a loss linear in the outputs
            return torch.zeros_like(directions)
        found = [
            torch.autograd.grad(
                self._gradient, self._at, one, retain_graph=True, materialize_grads=True
            )[0]
            for one in directions
        ]
        return torch.stack(found)
