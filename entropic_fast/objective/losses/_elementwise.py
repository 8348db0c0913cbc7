"""Losses of `torch.nn` by closed forms: squared errors, multi-label, Gaussian, margins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._utils import checks, trees
from ._reductions import Elementwise, OutputHessian, ReducedLoss, differing_sizes, require_shape

if TYPE_CHECKING:
    from ..data import ExampleSet


class DiagonalLoss(Elementwise):
    """A loss of one term per output, whose Hessian in the outputs is diagonal and known."""

    def curvatures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The second derivative of each example's loss in each of its outputs.  # [n, ...]"""
        raise TypeError(f"{type(self).__name__} has no curvatures")

    def output_hessian(
        self, outputs: Tensor, targets: Tensor, weights: Tensor
    ) -> OutputHessian | None:
        weights = weights.view(-1, *[1] * (outputs.ndim - 1))
        diagonal = self.curvatures(outputs, targets) * weights
        return lambda directions: directions * diagonal


class SquaredError(DiagonalLoss):
    """`nn.MSELoss`."""

    @property
    def no_likelihood(self) -> str:
        return ""

    def curvatures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.full_like(outputs, 2 * self.scale(outputs[:1].numel()))


class BinaryCrossEntropy(DiagonalLoss):
    """`nn.BCEWithLogitsLoss`: independent labels, or "bce" by name.

    Targets are probabilities of each label, mostly 0 or 1, of the outputs' shape.

    >>> loss = BinaryCrossEntropy(nn.BCEWithLogitsLoss())
    >>> x, y = torch.zeros(1, 2), torch.tensor([[0, 1]])
    >>> loss(x, y), loss.curvatures(x, y)
    (tensor([0.6931]), tensor([[0.1250, 0.1250]]))
    """

    def __init__(self, loss: nn.BCEWithLogitsLoss) -> None:
        super().__init__(loss)
        self._weight, self._pos_weight = loss.weight, loss.pos_weight

    @property
    def no_likelihood(self) -> str:
        if self._weight is None and self._pos_weight is None:
            return ""
        return "weights of labels or of positive ones, with which it is no likelihood"

    def curvatures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        curvatures = outputs.sigmoid() * (-outputs).sigmoid() * self.scale(outputs[:1].numel())
        if self._pos_weight is not None:
            excess = self._pos_weight.to(outputs) - 1
            curvatures = curvatures * (1 + excess * targets.to(outputs.dtype))
        return curvatures if self._weight is None else curvatures * self._weight.to(outputs)

    def require_targets(self, examples: ExampleSet) -> None:
        """Reject targets outside 0 .. 1, such as -1 or -100 for unknown labels."""
        for batch in examples.batches():
            targets = trees.leaves(batch.targets)[0]
            bad = ~((targets >= 0) & (targets <= 1))
            if bool(bad.any()):
                where = tuple(int(i) for i in bad.nonzero()[0])
                raise checks.invalid(
                    "targets",
                    "probabilities of labels in 0 .. 1",
                    f"{float(targets[where]):.6g} for example {batch.start + where[0]}",
                    "for labels that are unknown pass a function that returns one loss per example "
                    "and leaves them out",
                )


class KLDivergence(Elementwise):
    """`nn.KLDivLoss`, of outputs that are log-probabilities.

    Of normalized outputs [n, C] it is computed with the logarithm of their sum added, which is 0,
    so that the Gauss-Newton matrix is that of soft targets.
    """

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        terms = super().terms(outputs, targets)
        if not self.normalized:
            return terms
        return terms + self._probabilities(outputs, targets) * outputs.logsumexp(1, keepdim=True)

    def _probabilities(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype)
        return targets.exp() if getattr(self.torch_loss, "log_target", False) else targets

    def output_hessian(
        self, outputs: Tensor, targets: Tensor, weights: Tensor
    ) -> OutputHessian | None:
        if not self.normalized:
            return None
        p = outputs.softmax(1)
        mass = self._probabilities(outputs, targets).sum(1, keepdim=True)
        scaled = p * (mass * weights[:, None] * self.scale(outputs[:1].numel()))

        def product(directions: Tensor) -> Tensor:
            return (directions - (directions * p).sum(2, keepdim=True)) * scaled

        return product


class GaussianNLL(ReducedLoss):
    """`nn.GaussianNLLLoss`: outputs (mean, variance), or targets (target, variance).

    A variance under `eps` counts as the constant `eps` (torch lets its gradient pass); a negative
    one gives NaN, which is rejected.
    """

    def __init__(self, loss: nn.GaussianNLLLoss) -> None:
        super().__init__(loss.reduction)
        self._full, self._eps = loss.full, loss.eps

    def divisor(self, examples: ExampleSet) -> float | None:
        return differing_sizes(examples, True)

    def terms(self, outputs: Any, targets: Any) -> Tensor:
        mean, target, variance = _gaussian(outputs, targets)
        require_shape(mean, target)
        if variance.ndim == mean.ndim - 1 and variance.shape == mean.shape[:-1]:
            variance = variance.unsqueeze(-1)
        fits = variance.shape[:-1] == mean.shape[:-1] and variance.shape[-1:] in (
            mean.shape[-1:],
            (1,),
        )
        if not fits and not (variance.shape[:1] == mean.shape[:1] and variance[0].numel() == 1):
            raise checks.invalid(
                "outputs",
                f"a variance that fits the mean {list(mean.shape)}",
                f"shape {list(variance.shape)}",
            )
        variance = variance.to(mean.dtype)
        clamped = torch.where(variance < 0, math.nan, variance.clamp(min=self._eps))
        terms = 0.5 * (clamped.log() + (mean - target.to(mean.dtype)).square() / clamped)
        return terms + 0.5 * math.log(2 * math.pi) if self._full else terms


def _gaussian(outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list) and len(outputs) == 2:
        return outputs[0], targets, outputs[1]
    if isinstance(outputs, Tensor) and isinstance(targets, tuple | list) and len(targets) == 2:
        return outputs, targets[0], targets[1]
    raise checks.invalid(
        "outputs",
        "a mean and a variance for nn.GaussianNLLLoss",
        checks.describe(outputs),
        "let the model return (mean, variance), or give (target, variance) as targets",
    )


class MultiMargin(Elementwise):
    """`nn.MultiMarginLoss` and `nn.MultiLabelMarginLoss`, which torch differentiates only once."""

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.torch_loss
        if outputs.ndim != 2:
            raise checks.invalid("outputs", "scores [N, C]", checks.describe(outputs))
        if isinstance(loss, nn.MultiMarginLoss):
            if targets.shape != outputs.shape[:1]:
                raise checks.invalid("targets", "class numbers [N]", checks.describe(targets))
            labels = targets.long().unsqueeze(1)
            gaps = (loss.margin - outputs.gather(1, labels) + outputs).relu() ** loss.p
            if loss.weight is not None:
                gaps = gaps * loss.weight.to(outputs)[labels]
            others = 1 - functional.one_hot(labels[:, 0], outputs.shape[1])
            return (gaps * others).sum(1) / outputs.shape[1]
        require_shape(outputs, targets)
        valid = (targets >= 0).long().cumprod(1)  # labels end at the first -1
        labels = targets.clamp(min=0)
        others = 1 - (functional.one_hot(labels, outputs.shape[1]) * valid.unsqueeze(2)).amax(1)
        gaps = (1 - outputs.gather(1, labels).unsqueeze(2) + outputs.unsqueeze(1)).relu()
        return (gaps * valid.unsqueeze(2) * others.unsqueeze(1)).sum((1, 2)) / outputs.shape[1]
