"""The mean loss over the data and its gradient, shared among ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.full_precision import full_precision
from .._torch.graph_checks import require_classifier, require_finite_losses, require_in_range
from .._utils import checks
from .._utils.devices import is_gpu
from ..distributed import Communicator
from ._functional_model import FunctionalModel
from .data import Batch, batches_in_range, fingerprint
from .losses._cross_entropy import CrossEntropy
from .losses._functions import closed_form, hits, widened

COMPARED = 8  # examples whose outputs and losses ranks compare


class MeanLoss(FunctionalModel):
    """The mean loss of a model over its data, as a function of theta."""

    communicator: Communicator
    weight_decay: float

    def local_batches(
        self, max_examples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """This rank's block of `batches`."""
        batches = self.batches(max_examples, batch_size)
        first, last = self.local_range(max_examples)
        return batches_in_range(batches, first, last, keep_whole=not self.separable)

    def local_range(self, max_examples: int | None = None) -> tuple[int, int]:
        """This rank's examples: the first, and the one after the last."""
        return self.communicator.range(self.count(max_examples))

    def all_reduce(self, compute: Callable[[], Tensor], *what: object) -> Tensor:
        """The sum over ranks of `compute`, which uses `local_batches`; `what` names the call."""
        return self.communicator.all_reduce(compute, *what, self.fingerprint)

    def fingerprint(self) -> str:
        """Data, dtype and normalization as text, by which ranks compare their objectives."""
        data = self.examples.fingerprint()[:12]
        decay = f", weight_decay={self.weight_decay}" if self.weight_decay else ""
        return f"{self.num_examples} examples {data}, {self.dtype}, norm={self.norm!r}{decay}"

    def distributed_facts(self) -> dict[str, str]:
        """Facts that must be the same on every rank, by name."""
        settings = (self.loss_name, self.norm, str(self.dtype), self.examples.batch_size)
        return {
            "model": fingerprint([self.parameters_vector(), *self.frozen_tensors()]),
            "data": self.examples.fingerprint(),
            "settings": repr((*settings, self.weight_decay)),
        }

    def sample_values(self) -> list[Tensor]:
        """Outputs and losses of the first examples, by which ranks compare their functions."""
        batch = next(self.batches(batch_size=COMPARED if self.separable else None))
        with torch.no_grad():
            outputs = self.outputs(self.parameters_vector(), batch.inputs)
            return [outputs, self.output_losses(outputs, batch.targets)]

    def penalty(self, theta: Tensor) -> Tensor:
        """weight_decay / 2 |theta|^2 at points [P] or [R, P], differentiable, in float64."""
        return (0.5 * self.weight_decay) * theta.double().square().sum(-1)

    def minibatch_loss(self, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        """The mean loss of a minibatch at theta [P], with weight decay; differentiable."""
        loss = self.losses(theta, inputs, targets).mean()
        return loss + self.penalty(theta).to(loss.dtype) if self.weight_decay else loss

    def example_losses(self, theta: Tensor | None = None) -> Tensor:
        """Loss of every example, without gradient.  # [N]

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        theta = self.point(theta)

        def local_sum() -> Tensor:
            losses = torch.zeros(self.num_examples, dtype=torch.float64, device=self.device)
            for batch in self.local_batches():
                where = slice(batch.start, batch.start + batch.size)
                losses[where] = self.finite_losses(theta, batch)
            return losses

        with torch.no_grad():
            if self.communicator.size == 1:
                return torch.cat([self.finite_losses(theta, batch) for batch in self.batches()])
            if self._loss_dtype is None:
                first = next(self.batches())
                self._loss_dtype = self.losses(theta, first.inputs, first.targets).dtype
            return self.all_reduce(local_sum, "losses", theta).to(self._loss_dtype)

    def finite_losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """`losses` of a batch, rejected if one is NaN or infinite.  # [n]"""
        losses = self.losses(theta, batch.inputs, batch.targets)
        require_finite_losses(losses.detach(), theta, *batch)
        return losses

    def mean_losses(self, points: Tensor) -> Tensor:
        """`loss` at finite points [R, P], read back at once; float64, on the CPU.  # [R]"""
        if self.communicator.size > 1:
            return torch.tensor([self.loss(point) for point in points], dtype=torch.float64)
        if not len(points):
            return torch.zeros(0, dtype=torch.float64)
        with torch.no_grad():
            means = torch.stack([self.unread_loss(point) for point in points]).cpu()
        for point, value in zip(points, means.tolist(), strict=True):
            if not math.isfinite(value):
                self.loss(point)
        return means

    def unread_loss(self, theta: Tensor) -> Tensor:
        """`loss` at a finite theta [P] by this rank, even if NaN or infinite; not read back."""
        losses = [self.losses(theta, batch.inputs, batch.targets) for batch in self.batches()]
        mean = torch.cat(losses).double().mean()
        return mean + self.penalty(theta) if self.weight_decay else mean

    def loss(self, theta: Tensor | None = None) -> float:
        """Mean loss over all examples at theta [P], summed in float64, with weight decay."""
        mean = float(self.example_losses(theta).double().mean())
        return mean + float(self.penalty(self.point(theta))) if self.weight_decay else mean

    @full_precision()
    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """Gradient of `loss` at theta [P], in theta's dtype.  # [P]

        Batches are summed in float32 or more. In half precision each batch's gradient is rounded to
        half, and entries of the mean below the dtype's smallest number (6e-8 for float16) are 0.

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
            ValueError: a half-precision gradient that overflows.
        """
        theta = self._fitting(theta)

        def local_sum() -> Tensor:
            total, losses = None, []
            for batch in self.local_batches():
                leaf = theta.detach().requires_grad_()
                batch_losses = self.losses(leaf, batch.inputs, batch.targets)
                losses.append(batch_losses.detach())
                if not later:
                    require_finite_losses(batch_losses.detach(), theta, *batch)
                gradient = widened(torch.autograd.grad(batch_losses.sum(), leaf)[0]).contiguous()
                total = gradient if total is None else total.add_(gradient)
            if later and not checks.all_finite(theta, *losses):
                self.point(theta)
                for batch in self.local_batches():
                    self.finite_losses(theta, batch)
            return widened(torch.zeros_like(theta)) if total is None else total

        # On a GPU, a look at the point and at each batch's losses would wait as many times.
        later = is_gpu(self.device)
        if not later:
            self.point(theta)
        total = self.all_reduce(local_sum, "gradient", theta)
        require_in_range(total, theta.dtype)
        mean = total.div_(self.num_examples)
        if self.weight_decay:
            mean.add_(theta, alpha=self.weight_decay)
        return mean.to(theta.dtype)

    @property
    def is_classifier(self) -> bool:
        """Whether the loss is a cross entropy of class scores [N, C] and integer targets [N]."""
        if not isinstance(closed_form(self.loss_fn), CrossEntropy):
            return False
        batch = next(self.batches(batch_size=2))
        if batch.targets.ndim != 1 or batch.targets.is_floating_point():
            return False
        with torch.no_grad():
            return self.outputs(self._theta, batch.inputs).ndim == 2

    def evaluate(self, theta: Tensor | None = None) -> tuple[float, float]:
        """Mean loss, and the share of examples whose largest output is the target.

        Examples whose label the loss ignores do not count in the share.

        Raises:
            ValueError: outputs that are not class scores [N, C] with integer targets [N].
            NonFiniteLossError: a loss that is NaN or infinite.
        """
        self.require_outputs("an accuracy")
        theta = self.point(theta)

        def local_sum() -> Tensor:
            sums = torch.zeros(3, dtype=torch.float64, device=self.device)
            for batch in self.local_batches():
                outputs = self.outputs(theta, batch.inputs)
                require_classifier(outputs, batch.targets)
                losses = self.output_losses(outputs, batch.targets)
                require_finite_losses(losses, theta, *batch)
                sums[0] += losses.double().sum()
                sums[1:] += hits(self.loss_fn, outputs, batch.targets)
            return sums

        with torch.no_grad():
            loss, correct, counted = self.all_reduce(local_sum, "evaluate", theta).tolist()
        share = correct / counted if counted else math.nan
        return loss / self.num_examples + float(self.penalty(theta)), share
