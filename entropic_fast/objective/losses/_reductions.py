"""torch's losses with its reductions, as one loss per example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from ..._utils import checks, trees

if TYPE_CHECKING:
    from ..data import ExampleSet

# Products with the Hessians of examples' losses in their outputs, [K, n, ...] to [K, n, ...].
OutputHessian = Callable[[Tensor], Tensor]

REDUCTIONS = ("mean", "sum", "none")


class ReducedLoss:
    """One loss per example, whose mean over the data is the reduction that torch computes.

    torch's "mean" is the sum of all terms (one per output, position or example) over their number,
    or over the total weight of those that count. With N examples and that divisor W of the *entire
    data*, the loss of an example is N / W times the sum of its terms. W is a constant of the data,
    so the mean over a minibatch is an unbiased estimate of the full loss; torch's own mean of each
    minibatch is not, where W differs between minibatches.

    "sum" makes an example's loss N times the sum of its terms. With "none" it is their mean.

    Args:
        reduction: "mean", "sum" or "none".

    Attributes:
        factor: multiplies the sum of an example's terms; None for their mean.
        key: equal for losses of the same settings; None where that is not known.
        normalized: whether outputs are normalized log-probabilities; None if unknown or unused.
    """

    key: Hashable = None
    normalized: bool | None = None

    def __init__(self, reduction: str) -> None:
        self.reduction = checks.one_of("loss.reduction", reduction, REDUCTIONS)
        self.factor: float | None = None
        self._origin: ReducedLoss | None = None

    @property
    def origin(self) -> ReducedLoss:
        """The loss without data, the same for all that differ only in their constants."""
        return self._origin or self

    def terms(self, outputs: Any, targets: Any) -> Tensor:
        """The terms of each example, before any reduction.  # [n, ...]"""
        raise TypeError(f"{type(self).__name__} has no terms")

    def divisor(self, examples: ExampleSet) -> float | None:
        """The divisor of torch's mean over the data; None for equally many terms per example."""
        return None

    @property
    def no_likelihood(self) -> str:
        """Why it is not the negative log-likelihood of labels that can be drawn; "" if it is."""
        return "a loss that is no negative log-likelihood the library knows"

    def output_hessian(
        self, outputs: Tensor, targets: Tensor, weights: Tensor
    ) -> OutputHessian | None:
        """As `losses.output_hessian`; None where there is no closed form."""
        return None

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each example.  # [n]"""
        terms = self.terms(outputs, targets)
        if terms.ndim == 1:
            return terms if self.factor is None else terms * self.factor
        terms = terms.flatten(1)
        return terms.mean(1) if self.factor is None else terms.sum(1) * self.factor

    def bound_to(self, examples: ExampleSet) -> ReducedLoss:
        """This loss with the constants of the data; itself if they are the same."""
        factor: float | None = None
        if self.reduction == "sum":
            factor = float(examples.count)
        elif self.reduction == "mean":
            divisor = self.divisor(examples)
            if divisor is not None and not divisor > 0:
                raise checks.invalid(
                    "targets",
                    "at least one target that counts",
                    "only ignored ones, or class weights of 0",
                    "torch's mean is 0 / 0 there",
                )
            factor = None if divisor is None else examples.count / divisor
        if factor == self.factor:
            return self
        clone = copy.copy(self)
        clone.factor, clone._origin = factor, self.origin
        return clone

    def with_outputs(self, normalized: bool) -> ReducedLoss:
        """This loss for outputs that are or are not normalized log-probabilities."""
        base = copy.copy(self.origin)
        base.normalized = normalized
        base = interned(base, None if base.key is None else (base.key, normalized))
        if self.factor is None:
            return base
        clone = copy.copy(base)
        clone.factor, clone._origin = self.factor, base
        return clone

    def scale(self, terms: int) -> float:
        """The weight of each term in the loss of an example with so many terms."""
        return 1 / max(1, terms) if self.factor is None else self.factor


_interned: WeakValueDictionary[Hashable, ReducedLoss] = WeakValueDictionary()


def interned(loss: ReducedLoss, key: Hashable) -> ReducedLoss:
    """The existing loss with this key, or this one: facts about a loss are cached by identity."""
    loss.key = key
    return loss if key is None else _interned.setdefault(key, loss)


def settings_key(loss: _Loss) -> Hashable:
    """A loss of torch by its settings and weights; None for one of the user's."""
    if type(loss).__module__ != _Loss.__module__:
        return None
    settings = {n: v for n, v in vars(loss).items() if not n.startswith("_") and n != "training"}
    if not all(v is None or isinstance(v, bool | int | float | str) for v in settings.values()):
        return None
    tensors = (
        (name, str(t.dtype), tuple(t.shape), tuple(t.detach().flatten().tolist()))
        for name, t in loss.named_buffers()
    )
    return type(loss), tuple(sorted(settings.items())), tuple(tensors)


class Elementwise(ReducedLoss):
    """A loss of `torch.nn` with one term per output or per example.

    Its buffers are converted to the outputs' dtype and device.
    """

    def __init__(self, loss: _Loss) -> None:
        super().__init__("mean" if loss.reduction == "batchmean" else loss.reduction)
        self.torch_loss = copy.deepcopy(loss)
        # A batch mean is that of the examples' sums.
        self._by_example = loss.reduction == "batchmean"
        self._unreduced = copy.deepcopy(loss).requires_grad_(False)
        self._unreduced.reduction = "none"
        self._converted: dict[tuple[torch.dtype, torch.device], Callable[..., Tensor]] = {}
        self.same_shape = type(loss).forward in _SAME_SHAPE

    def terms(self, outputs: Any, targets: Any) -> Tensor:
        like = trees.leaves(outputs)[0]
        if self.same_shape:
            require_shape(outputs, targets)
            _require_no_example_weights(self._unreduced, outputs)
        return self._module(like)(*self._arguments(outputs, targets))

    def _arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """Arguments of the torch loss, of outputs that may be several, and targets."""
        like = trees.leaves(outputs)[0]
        kind = type(self.torch_loss).forward
        if isinstance(targets, Tensor) and (targets.is_floating_point() or kind in _NUMBERS):
            targets = targets.to(like.dtype)
        several = tuple(outputs.values()) if isinstance(outputs, dict) else outputs
        if not isinstance(several, tuple | list):
            return several, targets
        return tuple(several) if kind in _NO_TARGETS else (*several, targets)

    def _module(self, like: Tensor) -> Callable[..., Tensor]:
        key = like.dtype, like.device
        if key not in self._converted:
            self._converted[key] = copy.deepcopy(self._unreduced).to(like.device, like.dtype)
        return self._converted[key]

    def divisor(self, examples: ExampleSet) -> float | None:
        if self._by_example:
            return float(examples.count)
        if type(self.torch_loss).forward in _TERM_PER_EXAMPLE:
            return None
        return differing_sizes(examples, self.same_shape)

    def require_torch_value(self, outputs: Any, targets: Any) -> None:
        """Reject a loss whose reduction, on a batch, is not that of its terms."""
        n = trees.size(outputs)
        try:
            terms = self.terms(outputs, targets)
        except (TypeError, RuntimeError, IndexError) as error:
            raise checks.invalid(
                "loss",
                f"outputs and targets that {type(self.torch_loss).__name__} takes",
                f"{checks.describe(outputs)} and {checks.describe(targets)}, for which it fails: "
                f"{error}",
            ) from error
        if self.reduction == "none":
            return
        total = terms.double().sum()
        number = {"sum": 1, "mean": n if self._by_example else terms.numel()}[self.reduction]
        like = trees.leaves(outputs)[0]
        module = copy.deepcopy(self.torch_loss).to(like.device, like.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nn.KLDivLoss about its mean
            value = module(*self._arguments(outputs, targets))
        ours = float(total / max(1, number))
        slack = 1e3 * torch.finfo(like.dtype).eps
        scale = float(terms.detach().double().abs().sum() / max(1, number))
        fits = terms.shape[:1] == (n,) and value.ndim == 0
        if not fits or not abs(float(value) - ours) <= slack * scale:
            if fits and not (torch.isfinite(value) and torch.isfinite(total)):
                return  # the loss itself will be rejected, with the example named
            raise checks.invalid(
                "loss",
                f"{type(self.torch_loss).__name__} whose {self.reduction!r} is that of one term "
                "per output or example",
                f"{checks.describe(value)[:80]} for {n} examples, where its terms give {ours:.6g}",
                'pass it with reduction="none", or a function that returns one loss per example',
            )


def require_shape(outputs: Any, targets: Any) -> None:
    """Reject targets that torch would broadcast against the outputs, or not take."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        got = outputs if not isinstance(outputs, Tensor) else targets
        name = "outputs" if got is outputs else "targets"
        raise checks.invalid(name, "one tensor for this loss", checks.describe(got))
    if outputs.shape == targets.shape:
        return
    out, given = list(outputs.shape), list(targets.shape)
    what, do = "", ""
    if out[:-1] == given and out[-1] == 1:
        do = f"use targets.unsqueeze({len(given)})"
    elif given[:-1] == out and given[-1] == 1:
        do = f"use targets.squeeze({len(out)}), or keep the outputs' last axis in the model"
    elif len(out) == 2 and given == out[:1] and not targets.is_floating_point():
        do = "use one-hot targets, or nn.CrossEntropyLoss for class numbers"
    if do and "squeeze" in do:
        what = ", which torch would broadcast to a value per pair of examples"
    raise checks.invalid("targets", f"the outputs' shape {out}", f"{given}{what}", do)


def differing_sizes(examples: ExampleSet, count_targets: bool) -> float | None:
    """The number of terms in the data, one per target; None where examples have equally many.

    Raises:
        ValueError: examples of different sizes, for a loss whose terms are not its targets.
    """
    if examples.are_tensors:
        return None
    sizes, total = set(), 0
    for batch in examples.batches():
        targets = trees.leaves(batch.targets)[0]
        sizes.add(tuple(targets.shape[1:]))
        total += targets.numel()
    if len(sizes) == 1:
        return None
    if not count_targets:
        raise checks.invalid(
            "data",
            "examples of one shape, for a loss that takes a mean over its terms",
            f"targets of shapes {sorted(sizes)[:4]}",
            "pass a function that returns one loss per example",
        )
    return float(total)


def _require_no_example_weights(loss: nn.Module, outputs: Tensor) -> None:
    """Reject weights with an axis of the examples, which torch matches by place in the batch."""
    for name, weight in loss.named_buffers():
        if weight.ndim >= outputs.ndim and weight.shape[weight.ndim - outputs.ndim] != 1:
            raise checks.invalid(
                f"loss.{name}",
                f"a weight per output, fit for outputs {list(outputs.shape)} of any batch",
                f"shape {list(weight.shape)}, an axis of which belongs to the examples",
                "give each example's weight with its targets, and weight its loss in a function",
            )


def _forwards(*kinds: type[_Loss]) -> frozenset[Any]:
    return frozenset(kind.forward for kind in kinds)


_SAME_SHAPE = _forwards(
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.HingeEmbeddingLoss,
)
# Targets that may be integers though the computation is one of floating-point numbers.
_NUMBERS = _SAME_SHAPE | _forwards(nn.CosineEmbeddingLoss, nn.MarginRankingLoss)
_NO_TARGETS = _forwards(nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss)
_TERM_PER_EXAMPLE = _NO_TARGETS | _forwards(
    nn.MultiLabelSoftMarginLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.CosineEmbeddingLoss
)
