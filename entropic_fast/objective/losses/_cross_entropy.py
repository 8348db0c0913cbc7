"""Cross-entropy and negative log-likelihood over classes, with torch's reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._utils import checks
from ._reductions import OutputHessian, ReducedLoss

if TYPE_CHECKING:
    from ..data import ExampleSet

IGNORED = -100


class CrossEntropy(ReducedLoss):
    """`nn.CrossEntropyLoss` as one loss per example: class weights, ignored labels, smoothing.

    With torch's default reduction, "mean", the mean over the examples is torch's over the data: the
    weighted sum over all positions that are not ignored, divided by the sum of their weights (by
    the number of positions, if targets are probabilities); see `ReducedLoss`. With reduction="none"
    an example's loss is the mean over all its positions, as for the name "cross_entropy", with
    ignored ones as 0.

    Args:
        loss: its class weights are converted to the outputs' dtype and device.

    Attributes:
        ignored: the label that does not count.

    >>> import torch
    >>> loss = CrossEntropy(nn.CrossEntropyLoss(ignore_index=-100, reduction="none"))
    >>> loss(torch.zeros(2, 3), torch.tensor([-100, 1]))
    tensor([0.0000, 1.0986])
    """

    name = "nn.CrossEntropyLoss"
    takes_probabilities = True
    class_axis = 1

    def __init__(self, loss: nn.CrossEntropyLoss) -> None:
        super().__init__(loss.reduction)
        self.ignored, self.smoothing = loss.ignore_index, loss.label_smoothing
        self.weight = None if loss.weight is None else loss.weight.detach().clone()

    def positions(self, targets: Tensor) -> Tensor:
        """The target of each position, where classes are in axis 1 of the outputs."""
        if not isinstance(targets, Tensor):
            raise checks.invalid("targets", "one tensor of labels", checks.describe(targets))
        return targets if targets.is_floating_point() else targets.long()

    @property
    def by_class(self) -> bool:
        """Whether its Hessian in the outputs is that of softmax."""
        return True

    @property
    def no_likelihood(self) -> str:
        """Why labels drawn from softmax do not have the loss's distribution; "" if they do."""
        if self.weight is not None:
            return "class weights, with which it is no likelihood"
        return "label smoothing, with which it is no likelihood" if self.smoothing else ""

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each position of outputs [n, C, ...].  # [n, ...]"""
        targets = self.positions(targets)
        return functional.cross_entropy(
            outputs.movedim(self.class_axis, 1),
            targets.to(outputs.dtype) if targets.is_floating_point() else targets,
            self._weight_like(outputs),
            ignore_index=self.ignored,
            reduction="none",
            label_smoothing=self.smoothing,
        )

    def divisor(self, examples: ExampleSet) -> float | None:
        total = 0.0
        for batch in examples.batches():
            targets = self.positions(batch.targets)
            if targets.is_floating_point():  # class weights do not enter torch's divisor then
                total += targets.numel() / max(1, targets.shape[1])
                continue
            counted = targets[targets != self.ignored]
            if self.weight is None:
                total += counted.numel()
            else:
                require_labels_weighted(counted, self.weight)
                total += float(self.weight.to(counted.device).double()[counted].sum())
        return total

    def target_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of each position's target weights, 0 where ignored; of one class's shape."""
        outputs, targets = outputs.movedim(self.class_axis, 1), self.positions(targets)
        weight = self._weight_like(outputs)
        mass = target_mass(outputs, targets, weight)
        if self.smoothing:
            total = outputs.shape[1] if weight is None else weight.sum()
            uniform = self.smoothing * total / outputs.shape[1]
            mass = (1 - self.smoothing) * mass + uniform
        if not targets.is_floating_point():
            mass = mass * (targets != self.ignored).unsqueeze(1)
        return mass.movedim(1, self.class_axis)

    def output_hessian(
        self, outputs: Tensor, targets: Tensor, weights: Tensor
    ) -> OutputHessian | None:
        """s (p u - p <p, u>), with probabilities p and s the sum of a position's target weights."""
        axis = self.class_axis
        scale = self.scale(outputs[:1].numel() // max(1, outputs.shape[axis]))
        mass = self.target_mass(outputs, targets)
        p = outputs.softmax(axis)
        scaled = p * (mass * weights.view(-1, *[1] * (outputs.ndim - 1)) * scale)

        def product(directions: Tensor) -> Tensor:
            inner = (directions * p).sum(axis + 1, keepdim=True)
            return (directions - inner).mul_(scaled)

        return product

    def _weight_like(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs)


class NextToken(CrossEntropy):
    """Cross-entropy of each next token, for causal language models; "next_token" by name.

    Outputs [n, T, V] are scores over the vocabulary at every position, targets [n, T] the tokens
    themselves: the scores at position t are compared with token t + 1. Tokens labeled -100
    (padding, prompts) do not count. Data without labels are tokens alone, or a dict with
    `input_ids`, of which those outside `attention_mask` do not count. The mean is over all tokens
    that count, in the data as one batch, as `transformers` computes it for a batch.

    >>> from entropic_fast import Objective
    >>> tokens = torch.tensor([[2, 1, 0, 1]])
    >>> obj = Objective(nn.Embedding(3, 5), "next_token", (tokens, tokens))
    >>> logits, labels = obj.outputs(obj.parameters_vector(), tokens)[0, :-1], tokens[0, 1:]
    >>> round(abs(obj.loss() - nn.functional.cross_entropy(logits, labels).item()), 6)
    0.0
    """

    name = "next_token"
    takes_probabilities = False
    class_axis = 2

    def __init__(self) -> None:
        super().__init__(nn.CrossEntropyLoss(ignore_index=IGNORED))

    def labels_of(self, inputs: Any) -> Tensor:
        """The tokens of a tensor or of `input_ids` as labels, padding ignored.  # [N, T]"""
        tokens = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
        if not isinstance(tokens, Tensor):
            raise checks.invalid(
                "data",
                "tokens: a tensor [N, T], or a dict with 'input_ids' or labels, for next_token",
                checks.describe(inputs),
            )
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        if mask is None or mask.shape != tokens.shape:
            return tokens
        return tokens.masked_fill(mask == 0, self.ignored)

    def positions(self, targets: Tensor) -> Tensor:
        """The token after each position; the last position, kept for its shape, is ignored."""
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.is_floating_point():
            raise checks.invalid(
                "targets", "token numbers [N, T] for next_token", checks.describe(targets)
            )
        targets = targets.long()
        return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], self.ignored)], 1)


class NegativeLogLikelihood(CrossEntropy):
    """`nn.NLLLoss`, of outputs that are log-probabilities, as one loss per example.

    It is linear in them, so its own Gauss-Newton matrix would be 0. For normalized ones, as by
    `nn.LogSoftmax`, cross-entropy is the same function, whose Gauss-Newton matrix is the Fisher
    matrix; the loss is then computed as that.
    """

    name = "nn.NLLLoss"
    takes_probabilities = False

    def __init__(self, loss: nn.NLLLoss) -> None:
        like = nn.CrossEntropyLoss(
            loss.weight, ignore_index=loss.ignore_index, reduction=loss.reduction
        )
        super().__init__(like)

    @property
    def no_likelihood(self) -> str:
        return super().no_likelihood if self.normalized else "log-probabilities not normalized"

    @property
    def by_class(self) -> bool:
        return bool(self.normalized)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.normalized:
            return super().terms(outputs, targets)
        return functional.nll_loss(
            outputs,
            self.positions(targets),
            self._weight_like(outputs),
            ignore_index=self.ignored,
            reduction="none",
        )

    def output_hessian(
        self, outputs: Tensor, targets: Tensor, weights: Tensor
    ) -> OutputHessian | None:
        return super().output_hessian(outputs, targets, weights) if self.normalized else _zero


def _zero(directions: Tensor) -> Tensor:
    return torch.zeros_like(directions)


def target_mass(outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of each position's target weights.  # [n, 1, ...], or a number for 1 each"""
    if not targets.is_floating_point():
        if weight is None:
            return outputs.new_ones(())
        return weight[targets.clamp(0, len(weight) - 1)].unsqueeze(1)
    if weight is not None:
        targets = targets * weight.view(-1, *[1] * (targets.ndim - 2))
    return targets.sum(1, keepdim=True)


def require_labels_weighted(labels: Tensor, weight: Tensor) -> None:
    """Reject labels outside 0 .. C - 1 for C class weights."""
    bad = labels[(labels < 0) | (labels >= len(weight))]
    if len(bad):
        raise checks.invalid(
            "targets",
            f"labels in 0 .. {len(weight) - 1} (the loss has {len(weight)} class weights)",
            str(int(bad[0])),
        )
