"""Losses of single examples, by name, from `torch.nn`, or as given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from ..._utils import checks
from ._cross_entropy import CrossEntropy, NegativeLogLikelihood, NextToken
from ._elementwise import (
    BinaryCrossEntropy,
    GaussianNLL,
    KLDivergence,
    MultiMargin,
    SquaredError,
)
from ._reductions import (
    Elementwise,
    OutputHessian,
    ReducedLoss,
    interned,
    require_shape,
    settings_key,
)

if TYPE_CHECKING:
    from ..data import ExampleSet

LossFunction = Callable[[Tensor, Tensor], Tensor]


def loss_function(loss: str | LossFunction) -> LossFunction:
    """A callable(outputs, targets) -> loss of each example [N].

    Losses of `torch.nn`, and functions of `torch.nn.functional` that have a module (also in a
    `functools.partial`), become a `ReducedLoss`.
    """
    if isinstance(loss, str):
        checks.one_of("loss", loss, NAMES)
        return NAMES[loss]
    if isinstance(loss, type):
        raise checks.invalid(
            "loss", "an instance", f"the class {loss.__name__}", f"pass nn.{loss.__name__}()"
        )
    if not callable(loss):
        raise checks.invalid(
            "loss",
            f"one of {', '.join(map(repr, NAMES))}, a loss of torch.nn, or a callable",
            checks.describe(loss),
        )
    module = _module_of(loss)
    if not isinstance(module, _Loss):
        return loss
    # What a subclass computes itself is only known by its reduction.
    for kind, make in _KNOWN.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return interned(make(module), settings_key(module))
    if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and module.reduction != "none":
        raise checks.invalid(
            "loss",
            'a subclass of it with reduction="none"',
            f"{type(module).__name__} with a {module.reduction} of its own",
            "return one loss per example from it",
        )
    return interned(Elementwise(module), settings_key(module))


def _module_of(loss: Any) -> Any:
    """The module of a function of `torch.nn.functional`, or the loss itself."""
    arguments: dict[str, Any] = {}
    function = loss
    if isinstance(loss, partial) and not loss.args:
        function, arguments = loss.func, loss.keywords
    try:
        kind = _MODULES.get(function)
    except TypeError:  # losses need not be hashable
        return loss
    if kind is None:
        return loss
    try:
        return kind(**arguments)
    except TypeError as error:
        raise checks.invalid(
            "loss",
            f"the arguments of nn.{kind.__name__}",
            f"functools.partial with {sorted(arguments)}",
            "pass the module, or a function that returns one loss per example",
        ) from error


def bound(loss: LossFunction, examples: ExampleSet) -> LossFunction:
    return loss.bound_to(examples) if isinstance(loss, ReducedLoss) else loss


def origin(loss: Any) -> Any:
    """The loss without the constants of the data."""
    return loss.origin if isinstance(loss, ReducedLoss) else loss


def widened(outputs: Tensor) -> Tensor:
    """Outputs as a loss takes them: half precision, of 2 or 3 digits, in float32.

    >>> import torch
    >>> widened(torch.ones(2, dtype=torch.bfloat16)).dtype, widened(torch.ones(2).double()).dtype
    (torch.float32, torch.float64)
    """
    return outputs.float() if outputs.dtype in checks.HALF else outputs


def computed_inside(outputs: Tensor, targets: Any) -> Tensor:
    """The loss of a model whose outputs are the losses of examples.  # [n]"""
    return outputs


def takes_tensor(loss: LossFunction) -> bool:
    """Whether a loss the library knows takes one tensor of outputs, as most do."""
    closed = closed_form(loss)
    several = isinstance(closed, GaussianNLL) or (
        isinstance(closed, Elementwise) and not closed.same_shape
    )
    return closed is not None and not several


def hits(loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """How many of outputs [n, C] have their largest where the label is, and how many count.

    >>> import torch
    >>> hits(CrossEntropy(nn.CrossEntropyLoss()), torch.eye(3), torch.tensor([0, -100, 1]))
    tensor([1, 2])
    """
    counted = torch.ones_like(targets, dtype=torch.bool)
    closed = closed_form(loss)
    if isinstance(closed, CrossEntropy) and closed is loss:
        counted = targets.long() != closed.ignored
    right = (outputs.argmax(1) == targets) & counted
    return torch.stack([right.sum(), counted.sum()])


def output_hessian(
    loss: LossFunction, outputs: Tensor, targets: Tensor, weights: Tensor
) -> OutputHessian | None:
    """The Hessian of a weighted sum of losses in closed form; None for other losses.

    For the squared error 2 u / m, with m outputs per example; for cross-entropy with probabilities
    p (softmax of the outputs) and s the sum of a position's target weights, s (p u - p <p, u>); for
    binary cross-entropy p (1 - p) u / m.

    Args:
        outputs, targets: [n, ...]
        weights: of the examples.  # [n]

    >>> import torch
    >>> H = output_hessian(cross_entropy, torch.zeros(1, 2), torch.tensor([0]), torch.ones(1))
    >>> H(torch.tensor([[[1.0, 0.0]]]))
    tensor([[[ 0.2500, -0.2500]]])
    """
    closed = closed_form(loss)
    if closed is None or not isinstance(outputs, Tensor):
        return None
    return closed.output_hessian(outputs, targets, weights.to(outputs.dtype))


def closed_form(loss: LossFunction) -> ReducedLoss | None:
    """The loss with its closed forms and likelihood; None for a function the library does not know.

    >>> import torch
    >>> isinstance(closed_form(mean_squared_error), SquaredError), closed_form(torch.sub)
    (True, None)
    """
    if isinstance(loss, ReducedLoss):
        return loss
    if loss is cross_entropy:
        return _CROSS_ENTROPY
    return _SQUARED_ERROR if loss is mean_squared_error else None


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats; a mean over positions for outputs [N, C, ...].  # [N]"""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, a mean over all outputs of an example, as `nn.MSELoss`.  # [N]"""
    require_shape(outputs, targets)
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


_CROSS_ENTROPY = CrossEntropy(nn.CrossEntropyLoss(reduction="none"))
_SQUARED_ERROR = SquaredError(nn.MSELoss(reduction="none"))

NAMES: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "mse": mean_squared_error,
    "bce": BinaryCrossEntropy(nn.BCEWithLogitsLoss()),
    "next_token": NextToken(),
}

_KNOWN: dict[type[_Loss], Callable[[Any], ReducedLoss]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.MSELoss: SquaredError,
    nn.GaussianNLLLoss: GaussianNLL,
    nn.KLDivLoss: KLDivergence,
    nn.MultiMarginLoss: MultiMargin,
    nn.MultiLabelMarginLoss: MultiMargin,
}

_MODULES: dict[Any, type[_Loss]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    functional.multi_margin_loss: nn.MultiMarginLoss,
    functional.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    functional.cosine_embedding_loss: nn.CosineEmbeddingLoss,
    functional.margin_ranking_loss: nn.MarginRankingLoss,
    functional.triplet_margin_loss: nn.TripletMarginLoss,
}
